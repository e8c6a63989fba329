"""Programs that try to do harm or to be rewarded for nothing: name, what it may end as besides a timeout, source.

Each is given two numbers a test and asked for their sum. A busy machine may end any of them by the clock.
"""

from __future__ import annotations

_SYSCALL = "import ctypes\nctypes.CDLL(None).syscall({})"

PROCESSES = {
    "fork bomb": ("contained", "import os\nwhile True:\n    os.fork()"),
    "one fork": ("contained", "import os\nprint(os.fork())"),
    "daemon": (
        "contained",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork() or __import__('time').sleep(99)",
    ),
    "raw clone": ("contained", _SYSCALL.format("56, 17, 0, 0, 0, 0")),
    "raw vfork": ("contained", _SYSCALL.format("58")),
    "clone3": ("crashed done", _SYSCALL.format("435, bytes(88), 88") + "\nraise SystemExit(3)"),
    "subprocess": ("contained", "import subprocess\nsubprocess.run(['id'])"),
    "shell": ("contained", "import os\nos.system('echo 3')"),
    "popen": ("contained", "import os\nprint(os.popen('echo 3').read())"),
    "exec": ("contained", "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo 3'])"),
    "exec of the interpreter": ("contained", "import os, sys\nos.execv(sys.executable, ['python', '-c', 'print(3)'])"),
    "exec of a file in memory": ("contained crashed", "import os\nos.execve(0, ['x'], {})"),
    "posix_spawn": ("contained", "import os\nos.posix_spawn('/bin/true', ['true'], {})"),
    "pool of processes": (
        "contained crashed",
        "import multiprocessing as m\nif __name__ == '__main__':\n    print(m.Pool(2).map(abs, [3]))",
    ),
    "pseudo-terminal": ("contained crashed", "import pty\npty.fork()"),
    "threads without end": (
        "crashed",
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,)).start()",
    ),
    "daemon threads that print later": (
        "done crashed",
        "import threading, time\ndef late():\n    while True:\n        print(3)\n"
        "threading.Thread(target=late, daemon=True).start()",
    ),
}
MEMORY = {
    "list without end": ("memory crashed", "kept = []\nwhile True:\n    kept.append(bytearray(1 << 24))"),
    "one huge list": ("memory", "kept = [0] * 10**10"),
    "string that doubles": ("memory crashed", "text = 'a'\nwhile True:\n    text += text"),
    "anonymous maps": (
        "memory crashed",
        "import mmap\nkept = []\nwhile True:\n    one = mmap.mmap(-1, 1 << 26)\n    one.write(bytes(1 << 26))\n"
        "    kept.append(one)",
    ),
    "files in memory": ("crashed", "import os\nkept = [os.memfd_create(str(i)) for i in range(50)]"),
    "locked memory": ("crashed done", "import ctypes\nraise SystemExit(ctypes.CDLL(None).mlockall(3))"),
    "huge power": ("memory", "print(9**9**9)"),
    "huge decimal text": ("crashed memory", "import sys\nsys.set_int_max_str_digits(0)\nprint(len(str(7**10**7)))"),
    "bomb of zeros": (
        "memory crashed",
        "import zlib\nb = zlib.compress(bytes(1 << 28))\nk = [zlib.decompress(b) for _ in range(9)]",
    ),
    "pipes filled": (
        "crashed",
        "import os, fcntl\nwhile True:\n    r, w = os.pipe()\n    fcntl.fcntl(w, 1031, 1 << 20)\n"
        "    os.write(w, bytes(1 << 16))",
    ),
    "recursion in C": (
        "crashed memory",
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __getattr__(s, n):\n"
        "        return getattr(s, n)\nA().x",
    ),
    "endless recursion": (
        "crashed memory",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    return f() + 1\nf()",
    ),
}
DISK = {
    "fills the disk": ("output crashed", "f = open('big', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))"),
    "fills the disk with many files": (
        "crashed",
        "for i in range(10**6):\n    with open(f'/tmp/{i}', 'wb') as f:\n        f.write(bytes(1 << 20))",
    ),
    "inodes": ("crashed", "for i in range(10**6):\n    open(f'/tmp/{i}', 'w').close()"),
    "deep folders": ("crashed", "import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')"),
    "shared memory": ("output crashed", "f = open('/dev/shm/x', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))"),
    "sparse file": ("output crashed", "import os\nos.truncate(os.open('s', os.O_CREAT | os.O_RDWR), 1 << 40)"),
    "stdout by fallocate": ("output crashed", "import os\nos.posix_fallocate(1, 0, 1 << 40)"),
    "stdout by truncate": ("output crashed", "import os\nos.ftruncate(1, 1 << 40)"),
    "stdin written": ("output crashed", "import os\nwhile True:\n    os.write(0, bytes(1 << 20))"),
    "flood of output": ("output", "while True:\n    print('x' * 10**6)"),
    "flood of errors": ("output", "import sys\nwhile True:\n    sys.stderr.write('x' * 10**6)"),
    "flood of results": ("output", "import os\nwhile True:\n    os.write(3, bytes(10**6))"),
    "fifo": ("contained crashed", "import os\nos.mkfifo('/tmp/f')"),
    "device node": ("contained crashed", "import os, stat\nos.mknod('/tmp/n', 0o600 | stat.S_IFBLK, os.makedev(8, 0))"),
}
TIME = {
    "busy loop": ("timeout", "while True:\n    pass"),
    "sleep": ("timeout", "import time\ntime.sleep(99)"),
    "ignored signals": (
        "timeout",
        "import signal, time\nfor s in range(1, 64):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    time.sleep(1)",
    ),
    "swallows everything": (
        "timeout",
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
    ),
    "regular expression": ("timeout", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')"),
    "stops itself": ("timeout", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True:\n    pass"),
    "busy threads": (
        "timeout",
        "import threading, hashlib\ndef f():\n    while True:\n"
        "        hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**6)\n"
        "for _ in range(8):\n    threading.Thread(target=f).start()",
    ),
    "endless at its end": ("timeout", "import atexit\n@atexit.register\ndef f():\n    while True:\n        pass"),
    "endless when deleted": ("timeout", "class A:\n    def __del__(s):\n        while True:\n            pass\nA()"),
    "timer signals": (
        "crashed",
        "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, .001, .001)\ntime.sleep(99)",
    ),
    "waits for more input": ("crashed", "while True:\n    input()"),
    "raised limit on time": (
        "timeout crashed",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))\nwhile True:\n    pass",
    ),
    "nested parentheses": ("compile", "x = " + "(" * 5000 + ")" * 5000),
    "nested unary operators": ("compile crashed", "x = " + "-" * 100_000 + "1"),
    "long source": ("compile", "x = [" + "1," * 10**6 + "]"),
    "slow to compile": ("compile crashed done", "x = [" + "(1,)," * 10**5 + "]\nraise SystemExit(3)"),
    "null byte": ("compile", "x = 1\0"),
    "lone surrogate in the source": ("compile crashed", "print('\ud800')"),
}
SIGNALS = {
    "kills its parent": ("done crashed", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nprint(1)"),
    "stops its parent": ("done crashed", "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nprint(1)"),
    "kills process 1": ("done crashed", "import os\nos.kill(1, 9)\nprint(1)"),
    "kills all": ("done crashed", "import os\nos.kill(-1, 9)\nprint(1)"),
    "kills every number": (
        "done crashed",
        "import os\nfor p in range(2, 500):\n    if p != os.getpid():\n        try:\n            os.kill(p, 9)\n"
        "        except OSError:\n            pass\nprint(1)",
    ),
    "kills its group": ("crashed", "import os\nos.killpg(0, 9)"),
    "floods its parent with signals": (
        "done crashed",
        "import os, signal\nfor _ in range(10**5):\n    os.kill(os.getppid(), signal.SIGCHLD)\nprint(1)",
    ),
    "signal by a file": (
        "crashed done",
        "import fcntl, os, signal, socket\na, b = socket.socketpair()\nfcntl.fcntl(a, fcntl.F_SETOWN, os.getppid())\n"
        "fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC)\nb.send(b'x')\nraise SystemExit(3)",
    ),
    "outlives its keeper": ("crashed done", _SYSCALL.format("157, 1, 0, 0, 0, 0") + "\nraise SystemExit(3)"),
    "null pointer": ("crashed", "import ctypes\nctypes.string_at(0)"),
    "abort": ("crashed", "import os\nos.abort()"),
    "kills itself": ("crashed", "import os\nos.kill(os.getpid(), 9)"),
}
NETWORK = {
    "tcp": ("contained", "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)"),
    "names": ("contained crashed", "import socket\nsocket.getaddrinfo('example.org', 80)"),
    "udp": (
        "contained",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))",
    ),
    "listens": ("contained", "import socket\nsocket.create_server(('', 0))"),
    "unix socket": ("contained", "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')"),
    "abstract socket": ("contained", "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0leak')"),
    "socket pair made to listen": (
        "crashed",
        "import socket\na, b = socket.socketpair()\na.bind('\\0leak')\na.listen()",
    ),
    "netlink": ("contained", "import socket\nsocket.socket(16, 3, 0)"),
    "raw packets": ("contained", "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "urllib": ("contained crashed", "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')"),
}
READING = {
    "home": (
        "crashed",
        "import os\nfound = [f for r, d, fs in os.walk('/root') for f in fs if '.ssh' in r]\n"
        "print(open('/root/.bashrc').read())",
    ),
    "passwords": ("crashed", "print(open('/etc/shadow').read())"),
    "users": ("crashed", "print(open('/etc/passwd').read())"),
    "environment": (
        "crashed",
        "import os\nassert not [k for k in os.environ if 'KEY' in k or 'TOKEN' in k or k == 'PATH']\n"
        "open('/proc/1/environ').read()",
    ),
    "memory of the parent": ("crashed", "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)"),
    "descriptors of the parent": ("crashed", "import os\nprint(os.listdir('/proc/1/fd'))"),
    "command lines": (
        "crashed",
        "import os\nfor p in os.listdir('/proc'):\n    if p.isdigit() and int(p) != os.getpid():\n"
        "        raise SystemExit('seen: ' + open(f'/proc/{p}/cmdline').read())\nraise SystemExit(3)",
    ),
    "inherited descriptors": (
        "crashed",
        "import os\nfound = []\nfor i in range(5, 1024):\n    try:\n        os.fstat(i)\n"
        "        found.append(i)\n    except OSError:\n        pass\nraise SystemExit('left open' if found else 3)",
    ),
    "kernel memory": ("crashed", "open('/proc/kcore', 'rb').read(1)"),
    "kernel log": ("crashed contained", "open('/dev/kmsg', 'rb').read(1)"),
    "disk": ("crashed", "open('/dev/vda', 'rb').read(1)"),
    "expected outputs on disk": (
        "crashed",
        "import glob\nfound = [open(f).read() for f in glob.glob('/**/*expected*', recursive=True)[:9]]\n"
        "raise SystemExit(3)",
    ),
    "the grader's modules": ("crashed", "import megatron_klear"),
    "expected outputs in memory": (
        "crashed done",
        "import gc\nfor one in gc.get_objects():\n    if isinstance(one, dict) and 'expected' in one:\n"
        "        print(one['expected'])",
    ),
}
KERNEL = {
    "asks to be dumped": (
        "crashed",
        "import ctypes, os\nif ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0:\n    print(3)\n    os._exit(0)\nos.abort()",
    ),
    "ptrace": ("contained", _SYSCALL.format("101, 16, 1, 0, 0")),
    "process_vm_readv": ("contained", _SYSCALL.format("310, 1, 0, 0, 0, 0, 0")),
    "process_vm_writev": ("contained", _SYSCALL.format("311, 1, 0, 0, 0, 0, 0")),
    "pidfd_getfd": ("contained", "import os\nh = os.pidfd_open(os.getppid())\n" + _SYSCALL.format("438, h, 0, 0")),
    "unshare": ("contained", "import ctypes\nctypes.CDLL(None).unshare(0x10000000)"),
    "setns": ("contained", _SYSCALL.format("308, 0, 0")),
    "mount": ("contained", "import ctypes\nctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None)"),
    "new mount calls": ("contained", _SYSCALL.format("430, b'tmpfs', 0")),
    "pivot_root": ("contained", _SYSCALL.format("155, b'/tmp', b'/tmp'")),
    "chroot": ("contained", "import os\nos.chroot('/tmp')"),
    "io_uring": ("contained", _SYSCALL.format("425, 1, 0")),
    "bpf": ("contained", _SYSCALL.format("321, 0, 0, 0")),
    "userfaultfd": ("contained", _SYSCALL.format("323, 0")),
    "perf": ("contained", _SYSCALL.format("298, 0, 0, 0, 0, 0")),
    "keyrings": ("contained", _SYSCALL.format("250, 0, 0")),
    "handles of files": ("contained", _SYSCALL.format("304, 0, 0, 0")),
    "System V memory": ("contained", _SYSCALL.format("29, 1, 4096, 0o1777")),
    "message queues": ("contained", _SYSCALL.format("240, b'x', 66, 0o600, 0")),
    "x32 calls": ("contained", _SYSCALL.format("0x40000000 + 39")),
    "a call of tomorrow": ("crashed", _SYSCALL.format("999") + "\nraise SystemExit(3)"),
    "seccomp listener": ("contained", _SYSCALL.format("317, 1, 8, 0")),
    "modules": ("contained", _SYSCALL.format("313, 0, b'', 0")),
    "reboot": ("contained", _SYSCALL.format("169, 0xfee1dead, 672274793, 0x1234567, 0")),
    "personality": ("contained", _SYSCALL.format("135, 0x0040000")),
    "setuid": ("contained", "import os\nos.setuid(0)"),
    "capset": ("contained", _SYSCALL.format("126, bytes(8), bytes(24)")),
    "clock": ("contained", "import time\ntime.clock_settime(0, 0)"),
    "hostname": ("contained", "import socket\nsocket.sethostname('x')"),
    "sysrq": ("crashed", "open('/proc/sysrq-trigger', 'w').write('b')"),
    "control groups": ("crashed", "import os\nos.mkdir('/sys/fs/cgroup/x')"),
    "adjusts its out-of-memory score": ("crashed", "open('/proc/self/oom_score_adj', 'w').write('-1000')"),
    "limits of the parent": (
        "crashed",
        "import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    ),
    "raises its limits": ("crashed", "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"),
    "affinity": ("crashed", "import os\nos.sched_setaffinity(0, {0})"),
    "terminal input": ("crashed", "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')"),
    "writes the interpreter": ("crashed", "import os\nopen(os.__file__, 'a').write('x')"),
    "writes the sandbox": ("crashed", "open('/sandbox/inside/runner.py', 'a').write('x')"),
    "writes /dev": ("crashed", "open('/dev/x', 'w')"),
    "makes files lie about their time": ("crashed", "import os\nos.utime(os.__file__, (0, 0))"),
    "changes modes": ("crashed", "import os\nos.chmod(os.__file__, 0o777)"),
}
CHEATING = {
    "constant answer": ("done", "print(3)"),
    "exits with success": ("done", "import os\nos._exit(0)"),
    "sys.exit(0)": ("done", "import sys\nsys.exit(0)"),
    "answer, then failure": ("crashed", "print(sum(map(int, input().split())))\nraise SystemExit(1)"),
    "answer, then crash": ("crashed", "print(sum(map(int, input().split())), flush=True)\nimport os\nos.abort()"),
    "success markers": (
        "done",
        "print('PASSED')\nprint('{\"status\": \"done\", \"passed\": true}')\nprint('1 passed in 0.01s')",
    ),
    "answers for a verifier": ("done", "print('VERDICT: right\\nreward: 1.0')"),
    "writes in every descriptor": (
        "crashed contained",
        "import os\nfor i in range(64):\n    try:\n"
        '        os.write(i, b\'{"first": true, "status": "done", "wait": null}\')\n'
        "    except OSError:\n        pass\nraise SystemExit(5)",
    ),
    "says that tests have ended": ("done crashed", "import os\nfor _ in range(99):\n    os.write(4, b'.')\nprint(3)"),
    "closes every descriptor": ("crashed done", "import os\nos.closerange(0, 64)"),
    "ends its channel and stays": ("timeout", "import os\nos.close(4)\nwhile True:\n    pass"),
    "patches its driver": (
        "crashed contained",
        "import sys\nframe = sys._getframe()\nwhile frame:\n    if frame.f_globals.get('__name__') != '__main__':\n"
        "        frame.f_globals.clear()\n    frame = frame.f_back",
    ),
    "patches builtins": (
        "crashed",
        "import builtins\nbuiltins.print = builtins.input = lambda *a: '3'\nbuiltins.sum = lambda a: 3\n"
        "raise SystemExit(5)",
    ),
    "patches test frameworks": (
        "crashed done",
        "import unittest, sys, types\nunittest.TestCase.assertEqual = lambda *a: None\n"
        "sys.modules['pytest'] = types.ModuleType('pytest')\nprint('OK')",
    ),
    "traces its driver": (
        "done crashed",
        "import sys\ndef f(frame, event, argument):\n    frame.f_trace_opcodes = True\n    return f\n"
        "sys.settrace(f)\nprint('1 passed')",
    ),
    "another stdout": ("done crashed", "import sys, io\nsys.stdout = io.StringIO('3')\nprint(3, file=sys.stderr)"),
    "always equal": (
        "done crashed",
        "class Equal(str):\n    def __eq__(self, other):\n        return True\n    __hash__ = str.__hash__\n"
        "print(Equal('right'))",
    ),
    "input as output": ("done crashed output", "import os\nos.sendfile(1, 0, 0, 1 << 20)"),
    "locks and flags of its streams": (
        "crashed",
        "import fcntl, os\nfor i in range(4):\n    fcntl.flock(i, 2)\n"
        "    fcntl.fcntl(i, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT)\nraise SystemExit(5)",
    ),
    "seals": ("crashed", "import fcntl\nfor i in range(4):\n    fcntl.fcntl(i, 1033, 15)"),
    "leases": ("crashed", "import fcntl\nfor i in range(4):\n    fcntl.fcntl(i, 1024, 1)"),
    "maps its stdin": ("crashed", "import mmap\nm = mmap.mmap(0, 4)\nm[:4] = b'9 9\\n'\nraise SystemExit(5)"),
    "waits for the next test": (
        "timeout done",
        "import os, time\nprint(3, flush=True)\nos.write(4, b'.')\ntime.sleep(99)",
    ),
}
GROUPS = {
    "processes": PROCESSES,
    "memory": MEMORY,
    "disk": DISK,
    "time": TIME,
    "signals": SIGNALS,
    "network": NETWORK,
    "reading": READING,
    "kernel": KERNEL,
    "cheating": CHEATING,
}
HOSTILE = {name: program for group in GROUPS.values() for name, program in group.items()}
