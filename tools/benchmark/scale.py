"""What the control plane of a rollout step costs at 8 to 1,024 ranks, without a cluster.

    python tools/benchmark/scale.py             # the control plane, as below
    python tools/benchmark/scale.py cost ...    # the cost model of training and sampling: tools/benchmark/cost.py

No cluster is involved. What is called simulated is one process that does in turn what the ranks of a world would do at
once: planning, cutting and pickling are really done and timed, transfers are computed.

A step of made-up groups (8 samples a prompt, log-normal lengths up to 32K) is planned, cut into parts and serialised as
`distributed.exchange` sends it, for each stated layout; every byte counted is a byte that was serialised. Beside it is
the former way on the same step: all groups pickled to every rank, once drawn and once graded, and four floats a token.
Seconds are measured here, the ways from and to the orchestrator's process among them, but for the transfer: bytes a
second over gloo are measured between two local processes and along a chain of three, and the seconds of a simulated
world are computed from them, with one stream out of rank 0, and one into it for which data ranks take turns. That
is a loopback figure of one machine, not of a network; broadcasts and sums of a few kilobytes are left out. The smallest
world's rows are given out among as many local processes too, which share the machine's cores.
The rollout file is written for real, of the first groups of the step; its size says little, as texts are one repeated
letter (tests/unit/test_rollout_files.py has the bound on real ones).
Sockets are counted in /proc of real gloo processes; those of a world on NCCL follow from its one gloo group.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_klear.cli.environment import enter_environment

enter_environment()

import numpy as np
import torch
import torch.distributed as dist

from megatron_klear.config.base import ParallelConfig
from megatron_klear.config.rl import AlgorithmConfig
from megatron_klear.data.packing import RowSettings, sequence_work
from megatron_klear.distributed import exchange, wire
from megatron_klear.mcore.topology import world
from megatron_klear.models.architecture import architecture_from_config
from megatron_klear.orchestrator.feed import StepGroups
from megatron_klear.orchestrator.link import Link
from megatron_klear.orchestrator.orchestrator import StepSamples, sampled_metrics
from megatron_klear.orchestrator.step_numbers import StepNumbers, TokenArrays
from megatron_klear.rl.advantages import advantages_of
from megatron_klear.rl.mismatch import MismatchSums
from megatron_klear.runs.rollout_files import RolloutWriter, rollout_file
from megatron_klear.train.token_ratios import LaidOut, laid_out, ratios_by_sample, taken_apart
from megatron_klear.train.updates import UpdatePlan, cut_into_updates, pack_rows, plan_update
from megatron_klear.types import Group, Prompt, Sample, Score, Verdict
from tools.benchmark import cost
from tools.benchmark.device import cpu_name
from tools.benchmark.packing import QWEN3_8B

STEPS = {"16.8M": 128, "134M": 1024}  # prompts, of 8 samples of 16K tokens on average
SAMPLES, PROMPT_TOKENS, CAP_TOKENS, MEAN_TOKENS = 8, 256, 32768, 16384
LAYOUTS = {8: (4, 1, 1), 64: (4, 2, 1), 256: (8, 2, 1), 1024: (8, 4, 1)}  # ranks: tensor, context, pipeline
RANKS_OF_NODE = 8
TRANSFER_BYTES = 32 << 20
GIVEN_BYTES = 151_000_000  # rows of 16.8 M tokens
TEXT_BYTES = 4  # of a token
TURNS = 200
ONE_ANSWER = ("transfer", "give", "turns")  # rank 0's
SIMULATED = (
    "No cluster: one process on this machine planned, cut and packed what each world's ranks would. Seconds named "
    "_computed, and wait_seconds with them, are bytes over the rate between local gloo processes, not a network's. "
    "Sockets are counted in real local processes."
)
Report = dict[str, Any]


def made_up_groups(prompts: int, seed: int = 0) -> list[Group]:
    """Graded groups whose samples have `MEAN_TOKENS` tokens on average, to a rounding and the cap."""
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(0.0, 0.6, (prompts, SAMPLES))
    for _ in range(8):  # the cap takes some off, so that the mean is approached in rounds
        lengths = np.clip(lengths * (MEAN_TOKENS / lengths.mean()), PROMPT_TOKENS + 16, CAP_TOKENS)
    return [_group(generator, index, of_group.astype(int).tolist()) for index, of_group in enumerate(lengths)]


def _group(generator: np.random.Generator, index: int, lengths: list[int]) -> Group:
    prompt = generator.integers(0, 151_000, PROMPT_TOKENS, dtype=np.int32)
    samples = []
    for length in lengths:
        tokens = generator.integers(0, 151_000, length, dtype=np.int32)
        tokens[:PROMPT_TOKENS] = prompt
        trained = np.arange(length) >= PROMPT_TOKENS
        logprobs = np.where(trained, -generator.random(length, dtype=np.float32), np.float32(0))
        finish = "length" if length >= CAP_TOKENS else "stop"
        samples.append(Sample(tokens=tokens, trained=trained, logprobs=logprobs, finish=finish))
    right = generator.random(SAMPLES) < 0.5
    return Group(
        prompt=Prompt(id=f"p{index}", data_source="math", tokens=prompt, text="x" * 1024, ground_truth="42"),
        samples=samples,
        texts=["y" * (TEXT_BYTES * length) for length in lengths],
        scores=[Score(reward=float(r), verdict=Verdict.RIGHT if r else Verdict.WRONG) for r in right],
    )


def size_of(value: Any) -> int:
    """Bytes of a value as the exchange sends it."""
    head, beside = wire.taken_apart(value)
    return len(head) + sum(buffer.nbytes for buffer in beside)


def over_link(parts: list[TokenArrays]) -> tuple[list[TokenArrays], float]:
    """The parts as rank 0 has them from the orchestrator, another process, and the seconds from its send to there."""
    ours, theirs = socket.socketpair()
    if not os.fork():
        theirs.recv(1)
        Link(theirs).send(parts)
        os._exit(0)
    start = time.perf_counter()
    ours.send(b"1")
    received: list[TokenArrays] = Link(ours).receive()
    seconds = time.perf_counter() - start
    os.wait()
    for end in (ours, theirs):
        end.close()
    return received, seconds


def kept(groups: list[Group], shares: list[LaidOut]) -> float:
    """Seconds from the data ranks' ratios on rank 0 to the orchestrator's word that the writer has them."""
    ours, theirs = socket.socketpair()
    if not os.fork():
        link, samples = Link(theirs), StepSamples(groups)
        link.send(len(samples.by_group(link.receive())))
        os._exit(0)
    start, link = time.perf_counter(), Link(ours)
    link.send({number: ratios for share in shares for number, ratios in taken_apart(share).items()})
    link.receive()
    seconds = time.perf_counter() - start
    os.wait()
    for end in (ours, theirs):
        end.close()
    return seconds


def former_bytes(groups: list[Group], tokens: int) -> int:
    """What every rank received the former way: groups drawn, groups graded, four floats and a ratio a token."""
    # One group at a time, so that no pickle of the whole step lies in memory beside it.
    drawn = sum(size_of(Group(prompt=g.prompt, samples=g.samples, texts=g.texts)) for g in groups)
    graded = sum(size_of(g) for g in groups)
    metrics = len(pickle.dumps(np.zeros(1 << 16), pickle.HIGHEST_PROTOCOL)) / (1 << 16)
    return drawn + graded + round(tokens * (2 * metrics + 4))


def plans_of(numbers: StepNumbers, data_size: int) -> list[UpdatePlan]:
    """The plans that every rank makes from the numbers, as a rollout step does."""
    algorithm = AlgorithmConfig(prompts_per_step=len(numbers.sizes), prompts_per_update=len(numbers.sizes) // 2)
    rewards, trained = numbers.by_group(numbers.rewards), numbers.by_group(numbers.trained.astype(np.int64))
    values = advantages_of(rewards, trained, algorithm.advantage, pass_k=algorithm.pass_k)
    rows = RowSettings(tokens_per_row=CAP_TOKENS + 64, segment_multiple=64, rows_per_step=1)
    work = sequence_work(architecture_from_config(QWEN3_8B))
    return [
        plan_update(update, algorithm, rows, work, longest_response=CAP_TOKENS, data_size=data_size)
        for update in cut_into_updates(numbers, values, algorithm.prompts_per_update)
    ]


def mismatch_bytes() -> int:
    """Of the sums and the histogram that ranks add up."""
    values = torch.zeros(1)
    sums = MismatchSums.of(values, values, values.exp(), values, "none")
    return 8 * (len(sums.sums) + len(sums.histogram) + 1)


def simulate(groups: list[Group], ranks: int, gloo_rate: float, chain_rate: float, turn: float) -> Report:
    """Bytes and seconds of one step's control plane in a world of `ranks`.

    Rates are bytes a second, from one process to another and along a chain of them; `turn` is the seconds in which rank
    0 hears a rank that has hardly anything to tell.
    """
    tensor, context, pipeline = LAYOUTS[ranks]
    data_size = ranks // (tensor * context * pipeline)
    replica = ranks // data_size
    clock = [time.perf_counter()]
    numbers = StepNumbers.of(groups)
    told = size_of((numbers, None))
    sampled_metrics(StepGroups(chosen=groups, graded=groups, num_informative=len(groups)), 0)
    clock.append(time.perf_counter())
    plans = plans_of(numbers, data_size)
    clock.append(time.perf_counter())
    samples = [sample for group in groups for sample in group.samples]
    numbers_of_parts = [[number for plan in plans for number in plan.numbers_of(rank)] for rank in range(data_size)]
    made = [TokenArrays.of({number: samples[number] for number in chosen}) for chosen in numbers_of_parts]
    clock.append(time.perf_counter())
    arrays, link = over_link(made)
    parts = [size_of(part) for part in arrays]
    largest = int(np.argmax(parts))
    head, beside = wire.taken_apart(arrays[largest])
    clock.append(time.perf_counter())
    received = wire.put_together(head, beside).samples()
    batches = [batch for plan in plans for batch in pack_rows(plan, largest, received)]
    clock.append(time.perf_counter())
    ratios = laid_out(ratios_by_sample(batches, [torch.ones(len(batch.tokens)) for batch in batches]))
    clock.append(time.perf_counter())
    gathered = size_of(ratios) * data_size
    names = ("numbers", "plan", "parts", "link", "unpack_and_pack", "ratios")
    seconds = dict(zip(names, np.diff(clock).tolist(), strict=True))
    seconds["link"] = link
    seconds["keep"] = kept(
        groups,
        [laid_out({n: np.ones(len(samples[n].tokens), np.float32) for n in chosen}) for chosen in numbers_of_parts],
    )
    # Rank 0 sends every part once: its own too, to the next of its replica.
    leaving = sum(parts) - (parts[0] if replica == 1 else 0)
    seconds["transfer_computed"] = leaving / gloo_rate
    # Within its replica a part goes from rank to rank in chunks: what a chain is slower, and a chunk's way along it.
    slower = max(0.0, 1 / chain_rate - 1 / gloo_rate)
    seconds["replica_computed"] = max(parts) * slower + (replica - 1) * exchange.CHUNK_BYTES / chain_rate
    seconds["ratios_computed"] = gathered / gloo_rate + (data_size - 1) * turn
    control = told + 2 * mismatch_bytes()  # a ring receives an all-reduce's values at most twice
    return {
        "ranks": ranks,
        "data_ranks": data_size,
        "rows_of_fullest_data_rank": len(batches),
        "control_bytes_of_a_rank": control,
        "own_rows_bytes_of_a_rank": max(parts),
        "bytes_of_a_node": min(ranks, RANKS_OF_NODE) * (control + max(parts)),
        "parts_bytes_leaving_rank_0": leaving,
        "ratios_bytes_received_by_rank_0": gathered,
        "ratios_bytes_with_padded_gather": size_of(ratios) * ranks,
        "seconds": seconds,
        "wait_seconds": sum(seconds.values()),
    }


def write_rollouts(groups: list[Group]) -> Report:
    """A real rollout file of the first groups."""
    with tempfile.TemporaryDirectory() as folder:
        writer = RolloutWriter(Path(folder), form="parquet")
        start = time.perf_counter()
        writer.write(1, groups)
        handed = time.perf_counter() - start
        writer.close()
        seconds = time.perf_counter() - start
        size = rollout_file(Path(folder), 1).stat().st_size
    tokens = sum(len(sample.tokens) for group in groups for sample in group.samples)
    return {"tokens": tokens, "bytes_a_token": size / tokens, "caller_waits": handed, "writer_seconds": seconds}


def count_sockets() -> int:
    """Open sockets of this process."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(entry))
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
    return sum(link.startswith("socket:") for link in links)


def _in_process(rank: int, size: int, port: int, lazy: bool, what: str, answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(int(lazy))
    torch.set_num_threads(1)
    if what == "megatron":
        with world(ParallelConfig(device="cpu", tensor=2 if size > 2 else 1)):
            exchange.tell_all("x")
            exchange.gather_all(rank)
            answers.put(("sockets", count_sockets()))
            dist.barrier()
        return
    dist.init_process_group("gloo")
    if what == "turns":
        exchange.gather_first(())
        start = time.perf_counter()
        for _ in range(TURNS):
            exchange.gather_first(())
        if rank == 0:
            answers.put(("seconds", (time.perf_counter() - start) / TURNS))
    elif what in ("transfer", "give"):
        # An array from rank 0 along a chain of all others, or to each data rank of the smallest world its rows.
        message, receivers = np.ones(TRANSFER_BYTES, np.uint8), [list(range(size))]
        if what == "give":
            replica = math.prod(LAYOUTS[size])
            receivers = [list(range(first, first + replica)) for first in range(0, size, replica)]
            message = np.ones(GIVEN_BYTES // len(receivers), np.uint8)
        seconds = []
        for _ in range(25):
            dist.barrier()
            start = time.perf_counter()
            exchange.give_each([message] * len(receivers), receivers)
            dist.barrier()
            seconds.append(time.perf_counter() - start)
        if rank == 0:
            answers.put(("seconds", sorted(seconds)[12]))
    else:
        exchange.tell_all("x")
        exchange.gather_all(rank)
        dist.all_reduce(torch.zeros(2048))
        answers.put(("sockets", count_sockets()))
    dist.barrier()
    dist.destroy_process_group()


def among_processes(size: int, what: str, *, lazy: bool = False) -> list[float]:
    """What the processes of a gloo world of `size` answer, sorted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_in_process, args=(rank, size, port, lazy, what, answers)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120)[1] for _ in range(1 if what in ONE_ANSWER else size)]
    for process in processes:
        process.join()
    return sorted(found)


def main() -> int:
    """Run every part and write the report; `cost` as first word is that of `tools.benchmark.cost`."""
    if sys.argv[1:2] == ["cost"]:
        return cost.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--sockets", nargs="*", type=int, default=[2, 4, 8], help="sizes of real gloo worlds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scale_cpu.json")
    arguments = parser.parse_args()
    rate, chain_rate = (TRANSFER_BYTES / among_processes(size, "transfer")[0] for size in (2, 3))
    print(f"gloo, medians of 25: two local processes {rate / 1e6:.0f} MB/s, chain of three {chain_rate / 1e6:.0f} MB/s")
    (turn,) = among_processes(2, "turns")
    (given,) = among_processes(min(LAYOUTS), "give")
    print(f"{GIVEN_BYTES / 1e6:.0f} MB of rows among {min(LAYOUTS)} local processes, median of 25: {given:.2f} s")
    report: Report = {"benchmark": "scale", "device": cpu_name(), "load_average_at_start": os.getloadavg()[0]}
    report |= {"simulated": SIMULATED, "gloo_bytes_a_second": rate, "gloo_chain_bytes_a_second": chain_rate}
    report["gloo_turn_seconds"] = turn
    report |= {"rows_given_out_measured": {"ranks": min(LAYOUTS), "bytes": GIVEN_BYTES, "seconds": given}, "steps": {}}
    met = True
    for name in arguments.steps:
        groups = made_up_groups(STEPS[name])
        tokens = sum(len(sample.tokens) for group in groups for sample in group.samples)
        former = former_bytes(groups, tokens)
        print(f"{name}: {tokens:,} tokens; the former way {former / 1e6:,.0f} MB to every rank")
        worlds = []
        for ranks in LAYOUTS:  # the median of three, by what a trainer waits
            tried = [simulate(groups, ranks, rate, chain_rate, turn) for _ in range(3)]
            worlds.append(sorted(tried, key=lambda one: one["wait_seconds"])[1])
        for one in worlds:
            print(_line(one), flush=True)
        files = write_rollouts(groups[:16])
        print(
            f"  rollout file, 16 groups: {files['writer_seconds']:.2f} s behind; {files['bytes_a_token']:.2f} B a "
            "token without the texts, which are one letter"
        )
        report["steps"][name] = {"tokens": tokens, "former_bytes_of_a_rank": former, "worlds": worlds, "files": files}
        if name == "16.8M":
            met = all(one["control_bytes_of_a_rank"] < 1e6 and one["wait_seconds"] < 1 for one in worlds)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    report["gloo_peers_on_nccl_counted_in_structure"] = {ranks: ranks - 1 for ranks in LAYOUTS}
    report["sockets"] = []
    for size, what, lazy in itertools.product(arguments.sockets, ("one_group", "megatron"), (False, True)):
        found = among_processes(size, what, lazy=lazy)
        report["sockets"].append({"ranks": size, "what": what, "lazy": lazy, "of_ranks": found})
        print(f"  sockets {what:<10} {size} ranks, lazy {lazy!s:<5}: {found}", flush=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print("at 16.8M tokens: wait < 1 s, < 1 MB a rank plus own rows:", "met" if met else "MISSED")
    return 0 if met else 1


def _line(one: Report) -> str:
    parts = "  ".join(f"{name} {seconds:.3f}" for name, seconds in one["seconds"].items())
    return (
        f"  {one['ranks']:>5} ranks, dp {one['data_ranks']:>3}: control {one['control_bytes_of_a_rank'] / 1e3:.0f} kB, "
        f"rows {one['own_rows_bytes_of_a_rank'] / 1e6:.1f} MB, wait {one['wait_seconds']:.2f} s ({parts}), "
        f"ratios to rank 0 {one['ratios_bytes_received_by_rank_0'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    raise SystemExit(main())
