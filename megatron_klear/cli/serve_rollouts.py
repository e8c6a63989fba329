"""Start the vLLM servers of a run on this machine, and start again those that die, until told to end.

klear serve --config examples/gppo_32k.toml
klear serve --config run.toml --rollout.server.host 0.0.0.0 --rollout.server.port 8000
klear serve --config run.toml --print-command

Takes the settings of `[rollout]` and `[rollout.server]`, overrides as the training script does. Once all servers are
healthy it prints their addresses, which the run is given as `rollout.servers`. SIGTERM and Ctrl-C end them.

    --print-command   show the servers' commands and start nothing
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType

from megatron_klear.config.checks_rollout import Served, check_servers, is_loopback
from megatron_klear.config.read import exit_on_bad_input, exit_with, parse_command_line
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.errors import exit_on_error
from megatron_klear.models.architecture import read_architecture
from megatron_klear.rollout.servers.command import ServerCommand, bracketed, loopback_of, run_commands
from megatron_klear.rollout.servers.servers import Servers, choose_ports

POLL_SECONDS = 0.5
_ENDING = (signal.SIGTERM, signal.SIGINT)


def reachable(command: ServerCommand) -> str:
    """The address to reach a server at: from other machines where it listens to them."""
    host = command.host
    if not is_loopback(host) and loopback_of(host) != host:  # every interface
        host = socket.gethostname()
    return f"http://{bracketed(host)}:{command.port}"


def serve(servers: Servers, commands: Sequence[ServerCommand]) -> None:
    """Run the servers until SIGTERM or SIGINT; raises ServersError where they do not start or cannot be kept up."""
    # An exception in place of an exit, so that what was begun is ended in order.
    for number in _ENDING:
        signal.signal(number, _interrupt)
    try:
        servers.start()
        addresses = [reachable(command) for command in commands]
        print(*(f"{address} is healthy" for address in addresses), sep="\n")
        print(f"[rollout]\nservers = {json.dumps(addresses)}", flush=True)
        while True:
            servers.poll()
            for notice in servers.notices():
                print(notice, flush=True)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print("ending the servers", flush=True)
    finally:
        _ignore()
        servers.close()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _ignore()  # once: another would break off the ending of the servers
    raise KeyboardInterrupt


def _ignore() -> None:
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, start, watch; exit code 2 for settings that cannot work, 1 for servers that do not."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    shown_only = "--print-command" in arguments
    arguments = [argument for argument in arguments if argument != "--print-command"]
    config = parse_command_line(GPPOConfig, arguments, description=__doc__ or "").config
    with exit_on_bad_input():
        architecture = read_architecture(config.model.path)
    problems = check_servers(config, architecture)
    if problems:
        exit_with(problems)
    rollout = config.rollout
    assert isinstance(rollout, VLLMRolloutConfig)
    server = rollout.server
    with exit_on_error():
        key = os.environ.get(rollout.api_key_variable) or None
        commands = run_commands(
            rollout, Served.by(config, architecture), choose_ports(server.port, server.count), api_key=key
        )
        if shown_only:
            print("\n".join(command.shown() for command in commands))
            return 0
        servers = Servers(
            commands,
            folder=config.output / "servers",
            startup_seconds=server.startup_seconds,
            max_restarts=server.max_restarts,
        )
        print(f"{len(commands)} servers are starting; their logs are in {config.output / 'servers'}", flush=True)
        serve(servers, commands)
    return 0
