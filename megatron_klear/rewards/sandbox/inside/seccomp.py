"""Which system calls a program may make, and the filter that says so to the kernel.

Names with their numbers on x86-64 and on aarch64 (the kernel's generic table), "-" where there is none. What is in no
table does not exist for programs (ENOSYS), as on an older kernel: clone3, which glibc then does without; memfd_create,
whose memory no limit counts; whatever kernels learn after this was written.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable

_ALLOWED = """
read:0:63 write:1:64 open:2:- close:3:57 stat:4:- fstat:5:80 lstat:6:- poll:7:- lseek:8:62 mmap:9:222
mprotect:10:226 munmap:11:215 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 pread64:17:67
pwrite64:18:68 readv:19:65 writev:20:66 access:21:- pipe:22:- select:23:- sched_yield:24:124 mremap:25:216
msync:26:227 mincore:27:232 madvise:28:233 dup:32:23 dup2:33:- pause:34:- nanosleep:35:101 getitimer:36:102
alarm:37:- setitimer:38:103 getpid:39:172 sendfile:40:71 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212
shutdown:48:210 getsockname:51:204 getpeername:52:205 socketpair:53:199 setsockopt:54:208 getsockopt:55:209
clone:56:220 exit:60:93 wait4:61:260 kill:62:129 uname:63:160 flock:73:32 fsync:74:82 fdatasync:75:83 truncate:76:45
ftruncate:77:46 getdents:78:- getcwd:79:17 chdir:80:49 fchdir:81:50 rename:82:- mkdir:83:- rmdir:84:- creat:85:-
link:86:- unlink:87:- symlink:88:- readlink:89:- chmod:90:- fchmod:91:52 umask:95:166 gettimeofday:96:169
getrlimit:97:163 getrusage:98:165 sysinfo:99:179 times:100:153 getuid:102:174 getgid:104:176 geteuid:107:175
getegid:108:177 setpgid:109:154 getppid:110:173 getpgrp:111:- setsid:112:157 getgroups:115:158 getresuid:118:148
getresgid:120:150 getpgid:121:155 getsid:124:156 capget:125:90 rt_sigpending:127:136 rt_sigtimedwait:128:137
rt_sigqueueinfo:129:138 rt_sigsuspend:130:133 sigaltstack:131:132 utime:132:- statfs:137:43 fstatfs:138:44
getpriority:140:141 sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125
sched_get_priority_min:147:126 sched_rr_get_interval:148:127 arch_prctl:158:- setrlimit:160:164
gettid:186:178 tkill:200:130 time:201:- futex:202:98 sched_getaffinity:204:123 epoll_create:213:- getdents64:217:61
set_tid_address:218:96 restart_syscall:219:128 fadvise64:221:223 timer_create:222:107 timer_settime:223:110
timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111 clock_gettime:228:113 clock_getres:229:114
clock_nanosleep:230:115 exit_group:231:94 epoll_wait:232:- epoll_ctl:233:21 tgkill:234:131 utimes:235:-
waitid:247:95 openat:257:56 mkdirat:258:34 futimesat:261:- newfstatat:262:79 unlinkat:263:35 renameat:264:38
linkat:265:37 symlinkat:266:36 readlinkat:267:78 fchmodat:268:53 faccessat:269:48 pselect6:270:72 ppoll:271:73
set_robust_list:273:99 get_robust_list:274:100 splice:275:76 tee:276:77 utimensat:280:88 epoll_pwait:281:22
signalfd:282:- timerfd_create:283:85 eventfd:284:- fallocate:285:47 timerfd_settime:286:86 timerfd_gettime:287:87
signalfd4:289:74 eventfd2:290:19 epoll_create1:291:20 dup3:292:24 pipe2:293:59 preadv:295:69 pwritev:296:70
rt_tgsigqueueinfo:297:240 getcpu:309:168 renameat2:316:276 getrandom:318:278
copy_file_range:326:285 preadv2:327:286 pwritev2:328:287 statx:332:291 rseq:334:293 pidfd_open:434:434
close_range:436:436 openat2:437:437 faccessat2:439:439 epoll_pwait2:441:441
"""
_KILLED = """
shmget:29:194 shmat:30:196 shmctl:31:195 socket:41:198 fork:57:- vfork:58:- execve:59:221 semget:64:190 semop:65:193
semctl:66:191 shmdt:67:197 msgget:68:186 msgsnd:69:189 msgrcv:70:188 msgctl:71:187 ptrace:101:117 syslog:103:116
setuid:105:146 setgid:106:144 setreuid:113:145 setregid:114:143 setgroups:116:159 setresuid:117:147
setresgid:119:149 setfsuid:122:151 setfsgid:123:152 capset:126:91 mknod:133:- personality:135:92 vhangup:153:58
modify_ldt:154:- pivot_root:155:41 adjtimex:159:171 chroot:161:51 acct:163:89 settimeofday:164:170 mount:165:40
umount2:166:39 swapon:167:224 swapoff:168:225 reboot:169:142 sethostname:170:161 setdomainname:171:162 iopl:172:-
ioperm:173:- init_module:175:105 delete_module:176:106 quotactl:179:60 nfsservctl:180:42 io_setup:206:0
io_submit:209:2 lookup_dcookie:212:18 semtimedop:220:192 clock_settime:227:112 mq_open:240:180 mq_unlink:241:181
mq_notify:244:184 kexec_load:246:104 add_key:248:217 request_key:249:218 keyctl:250:219 migrate_pages:256:238
mknodat:259:33 unshare:272:97 move_pages:279:239 perf_event_open:298:241 fanotify_init:300:262 fanotify_mark:301:263
name_to_handle_at:303:264 open_by_handle_at:304:265 clock_adjtime:305:266 setns:308:268 process_vm_readv:310:270
process_vm_writev:311:271 kcmp:312:272 finit_module:313:273 seccomp:317:277 kexec_file_load:320:294 bpf:321:280
execveat:322:281 userfaultfd:323:282 pidfd_send_signal:424:424 io_uring_setup:425:425 io_uring_enter:426:426
io_uring_register:427:427 open_tree:428:428 move_mount:429:429 fsopen:430:430 fsconfig:431:431 fsmount:432:432
fspick:433:433 pidfd_getfd:438:438 process_madvise:440:440 mount_setattr:442:442 quotactl_fd:443:443
landlock_create_ruleset:444:444 landlock_add_rule:445:445 landlock_restrict_self:446:446 memfd_secret:447:447
process_mrelease:448:448 statmount:457:457 listmount:458:458 open_tree_attr:467:467
"""
_REFUSED = """
setpriority:141:140 sched_setparam:142:118 sched_setscheduler:144:119 sched_setaffinity:203:122 mbind:237:235
set_mempolicy:238:237 ioprio_set:251:30 sched_setattr:314:274
"""
_CHECKED = """
ioctl:16:29 fcntl:72:25 prctl:157:167 prlimit64:302:261
"""

_COLUMN = {"x86_64": 1, "aarch64": 2}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
KILL, REFUSE, MISSING, NO_TERMINAL, ALLOW = 0x80000000, 0x00050001, 0x00050026, 0x00050019, 0x7FFF0000
"""Kill the process; EPERM; ENOSYS; ENOTTY; let it be."""
_X32 = 0x40000000
_CLONE_THREAD = 0x10000
_FCNTL_REFUSED = (8, 10, 15, 1024, 1026, 1033)
"""F_SETOWN, F_SETSIG, F_SETOWN_EX, by which a file signals a process; F_SETLEASE, F_NOTIFY; F_ADD_SEALS."""
_IOCTL_ALLOWED = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS and TIOCGWINSZ, which say that a file is no terminal; FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
_NOT_UNDER_LANDLOCK = ("truncate", "chmod", "fchmod", "fchmodat", "utime", "utimes", "futimesat", "utimensat")
"""What changes files without opening them, of which Landlock knows nothing."""
_SET_DEATH_SIGNAL, _SET_DUMPABLE = 1, 4
"""Of prctl. What can be dumped may be handed to a program of the system's when it crashes, whatever its limits."""
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4


def _argument_at(index: int) -> int:
    return 16 + 8 * index  # its low half


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


@functools.cache
def numbers(table: str, machine: str) -> dict[str, int]:
    """Names and numbers of a table's calls on x86_64 or aarch64."""
    rows = (row.split(":") for row in table.split())
    return {row[0]: int(row[_COLUMN[machine]]) for row in rows if row[_COLUMN[machine]] != "-"}


def number(name: str, machine: str) -> int:
    """The number of a system call of any table."""
    return numbers(f"{_ALLOWED} {_KILLED} {_REFUSED} {_CHECKED}", machine)[name]


def program_filter(machine: str, *, namespaces: bool = True) -> bytes:
    """The filter of a keeper and the processes of its tests, with namespaces of their own or without."""
    wanted = dict.fromkeys(numbers(_ALLOWED, machine).values(), ALLOW)
    wanted |= dict.fromkeys(numbers(_KILLED, machine).values(), KILL)
    wanted |= dict.fromkeys(numbers(_REFUSED, machine).values(), REFUSE)
    if not namespaces:
        wanted |= {at: ALLOW for name, at in numbers(_KILLED, machine).items() if name.startswith("landlock_")}
        wanted |= {at: REFUSE for name, at in numbers(_ALLOWED, machine).items() if name in _NOT_UNDER_LANDLOCK}
    parts = [
        _op(_LOAD, _ARCHITECTURE_AT) + _op(_EQUAL, _AUDIT[machine], 1, 0) + _op(_RETURN, KILL),
        _op(_LOAD, _NUMBER_AT) + _op(_AT_LEAST, _X32, 0, 1) + _op(_RETURN, KILL),
        _when(number("ioctl", machine), _by_argument(1, _IOCTL_ALLOWED, ALLOW, NO_TERMINAL)),
        _when(number("fcntl", machine), _by_argument(1, _FCNTL_REFUSED, REFUSE, ALLOW)),
        _when(number("prctl", machine), _by_argument(0, (_SET_DUMPABLE,), REFUSE, ALLOW)),
        _when(number("prlimit64", machine), _by_argument(0, (0,), ALLOW, REFUSE)),
        _by_ranges(wanted),
    ]
    return b"".join(parts)


def no_new_processes(machine: str) -> bytes:
    """The filter of a test's process besides: threads yes, processes no."""
    threads = (
        _op(_LOAD, _argument_at(0)) + _op(_ANY_BIT, _CLONE_THREAD, 0, 1) + _op(_RETURN, ALLOW) + _op(_RETURN, KILL)
    )
    return _op(_LOAD, _NUMBER_AT) + _when(number("clone", machine), threads) + _op(_RETURN, ALLOW)


def no_foreign_signals(machine: str, pid: int) -> bytes:
    """The filter of a process without namespaces besides: it signals itself alone, and dies with its keeper."""
    own = _by_argument(0, (pid,), ALLOW, REFUSE)
    refused = [number(name, machine) for name in ("tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")]
    parts = [_op(_LOAD, _NUMBER_AT), *(_when(number(name, machine), own) for name in ("kill", "tgkill"))]
    parts += [_when(one, _op(_RETURN, REFUSE)) for one in refused]
    parts.append(_when(number("prctl", machine), _by_argument(0, (_SET_DEATH_SIGNAL,), REFUSE, ALLOW)))
    return b"".join([*parts, _op(_RETURN, ALLOW)])


def _when(number_of_call: int, block: bytes) -> bytes:
    """`block`, which must return, for one system call; the number is loaded."""
    return _op(_EQUAL, number_of_call, 0, len(block) // 8) + block


def _by_argument(index: int, values: Iterable[int], then: int, otherwise: int) -> bytes:
    tests = b"".join(_op(_EQUAL, value, 0, 1) + _op(_RETURN, then) for value in values)
    return _op(_LOAD, _argument_at(index)) + tests + _op(_RETURN, otherwise)


def _by_ranges(wanted: dict[int, int]) -> bytes:
    """An action by number; neighbours with the same share a comparison."""
    parts, current = [], wanted.get(0, MISSING)
    for following in range(1, max(wanted) + 2):
        action = wanted.get(following, MISSING)
        if action != current:
            parts.append(_op(_AT_LEAST, following, 1, 0) + _op(_RETURN, current))
            current = action
    return b"".join([*parts, _op(_RETURN, current)])
