"""What is read out of a vLLM server's metrics."""

from megatron_klear.rollout.servers.metrics import read_metrics

# Lines as vLLM 0.32 writes them, others left out.
PAGE = """# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="policy"} 120.0
vllm:prompt_tokens_created{engine="0",model_name="policy"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="policy"} 1.5e+06
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",kv_cache_size_tokens="%s",num_gpu_blocks="100"} 1.0
"""


def test_tokens_and_cache_are_read():
    load = read_metrics(PAGE % "1584")
    assert load is not None
    assert (load.tokens, load.cache_tokens) == (1_500_120, 1584)


def test_a_server_that_does_not_tell_its_size_tells_its_blocks():
    load = read_metrics(PAGE % "None")
    assert load is not None
    assert load.cache_tokens == 1600


def test_engines_of_one_server_are_added_up():
    load = read_metrics(PAGE % "1584" + (PAGE % "1000").replace('engine="0"', 'engine="1"'))
    assert load is not None
    assert (load.tokens, load.cache_tokens) == (2 * 1_500_120, 2584)


def test_what_is_not_told_is_not_guessed():
    assert read_metrics("python_gc_objects_collected_total 5\n") is None
    assert read_metrics("<html>") is None
    assert read_metrics('vllm:generation_tokens_total{engine="0"} many\n') is None
    load = read_metrics('vllm:generation_tokens_total{engine="0"} 3.0\nvllm:cache_config_info{engine="0"} 1.0\n')
    assert load is not None
    assert load.cache_tokens is None
