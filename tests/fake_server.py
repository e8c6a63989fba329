"""Stands in for vLLM's server where only starting, dying and ending matter: `/health` answers, nothing else does.

FAKE_SERVER_DO: `serve`; `die` at once with a message; `deaf`, never healthy; `die_later`, at all starts but the first.
It has a worker in a session of its own that ignores SIGTERM, and shared memory, as vLLM has. FAKE_SERVER_PIDS names
a folder to which each start adds a file with its process ids.
"""

import http.server
import os
import signal
import subprocess
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path

WORKER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Health(http.server.BaseHTTPRequestHandler):
    """200 on every path."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    do = os.environ.get("FAKE_SERVER_DO", "serve")
    notes = Path(os.environ["FAKE_SERVER_PIDS"])
    notes.mkdir(exist_ok=True)
    starts = len(list(notes.glob("[0-9]*")))
    worker = subprocess.Popen([sys.executable, "-c", WORKER], start_new_session=True)
    memory = shared_memory.SharedMemory(create=True, size=4096)
    note = notes / f".{os.getpid()}"
    note.write_text(f"{os.getpid()} {worker.pid} {memory.name}")
    note.rename(notes / f"{starts}-{os.getpid()}")  # servers may start at the same moment
    if do == "die" or (do == "die_later" and starts):
        print("loading\nRuntimeError: not enough memory for the cache", flush=True)
        os._exit(3)
    if do == "deaf":
        time.sleep(600)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Health).serve_forever()


if __name__ == "__main__":
    main()
