"""What Python has on Unix and not on Windows, as data.

Source: the "Availability" notes of Python's documentation (library/os, signal, mmap, socket, select, time), as typeshed
writes them down by `sys.platform`. What came to Windows only after Python 3.10, the oldest that devices run, is here
too. `*` at the end of a name stands for any ending.
"""

from __future__ import annotations

from collections.abc import Mapping

_MODULES = "crypt curses fcntl grp nis ossaudiodev posix pty pwd readline resource spwd syslog termios tty"
MODULES = frozenset(_MODULES.split())
"""Whole modules."""

_OS = """
    CLD_* CLONE_* EFD_* EX_CANTCREAT EX_CONFIG EX_DATAERR EX_IOERR EX_NOHOST EX_NOINPUT EX_NOPERM EX_NOUSER EX_OSERR
    EX_OSFILE EX_PROTOCOL EX_SOFTWARE EX_TEMPFAIL EX_UNAVAILABLE EX_USAGE F_LOCK F_TEST F_TLOCK F_ULOCK GRND_* MFD_*
    NGROUPS_MAX O_ACCMODE O_ASYNC O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_FSYNC O_LARGEFILE O_NDELAY O_NOATIME
    O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_RSYNC O_SYNC O_TMPFILE PIDFD_* POSIX_* PRIO_* P_ALL P_PGID P_PID P_PIDFD
    RTLD_* RWF_* SCHED_* SEEK_DATA SEEK_HOLE SF_* SPLICE_* ST_* TFD_* WCONTINUED WCOREDUMP WEXITED WEXITSTATUS
    WIFCONTINUED WIFEXITED WIFSIGNALED WIFSTOPPED WNOHANG WNOWAIT WSTOPPED WSTOPSIG WTERMSIG WUNTRACED XATTR_* chflags
    chown chroot confstr* copy_file_range ctermid environb eventfd* fchdir fchmod fchown fdatasync fork forkpty
    fpathconf fstatvfs fwalk get_blocking getegid getenvb geteuid getgid getgrouplist getgroups getloadavg getpgid
    getpgrp getpriority getrandom getresgid getresuid getsid getuid getxattr grantpt initgroups killpg lchflags lchmod
    lchown listxattr lockf login_tty major makedev memfd_create minor mkfifo mknod nice openpty pathconf* pidfd_open
    pipe2 posix_* pread preadv ptsname pwrite pwritev readv register_at_fork removexattr sched_* sendfile set_blocking
    setegid seteuid setgid setgroups setns setpgid setpgrp setpriority setregid setresgid setresuid setreuid setsid
    setuid setxattr spawnlp spawnlpe spawnvp spawnvpe splice statvfs sync sysconf* tcgetpgrp tcsetpgrp timerfd_*
    ttyname uname unlockpt unshare wait wait3 wait4 waitid* writev
"""
_SIGNAL = """
    ITIMER_* ItimerError SIGALRM SIGBUS SIGCHLD SIGCLD SIGCONT SIGHUP SIGIO SIGIOT SIGKILL SIGPIPE SIGPOLL SIGPROF
    SIGPWR SIGQUIT SIGRT* SIGSTKFLT SIGSTOP SIGSYS SIGTRAP SIGTSTP SIGTTIN SIGTTOU SIGURG SIGUSR1 SIGUSR2 SIGVTALRM
    SIGWINCH SIGXCPU SIGXFSZ SIG_BLOCK SIG_SETMASK SIG_UNBLOCK Sigmasks alarm getitimer pause pidfd_send_signal
    pthread_* setitimer siginterrupt sigpending sigtimedwait sigwait sigwaitinfo struct_siginfo
"""
_SOCKET = """
    AF_ALG AF_CAN AF_NETLINK AF_PACKET AF_UNIX AF_VSOCK CMSG_* MSG_CMSG_CLOEXEC MSG_CONFIRM MSG_DONTWAIT MSG_EOR
    MSG_MORE MSG_NOSIGNAL SCM_* SOCK_CLOEXEC SOCK_NONBLOCK SO_BINDTODEVICE SO_PEERCRED SO_REUSEPORT TCP_CORK recv_fds
    send_fds sethostname
"""

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "os": tuple(_OS.split()),
    "signal": tuple(_SIGNAL.split()),
    "socket": tuple(_SOCKET.split()),
    "mmap": ("MADV_*", "MAP_*", "PROT_*"),
    "select": ("EPOLL*", "KQ_*", "PIPE_BUF", "POLL*", "devpoll", "epoll", "kevent", "kqueue", "poll"),
    "time": ("CLOCK_*", "clock_*", "pthread_getcpuclockid", "tzset"),
    "sys": ("abiflags", "getdlopenflags", "setdlopenflags"),
}
"""Names of modules that exist on both."""

METHODS = frozenset({"madvise"})
"""Methods of objects, known by their names alone: of mmap."""

KEYWORDS: Mapping[str, frozenset[str]] = {
    "mmap": frozenset({"flags", "prot"}),
    "Popen": frozenset({"preexec_fn", "pass_fds", "user", "group", "extra_groups", "umask", "process_group"}),
    "run": frozenset({"preexec_fn", "pass_fds", "user", "group", "extra_groups", "umask", "process_group"}),
}
"""Arguments that calls of these names do not take there."""


def is_unix_only(module: str, name: str) -> bool:
    """Whether Windows' `module` has no `name`."""
    return any(name.startswith(one[:-1]) if one.endswith("*") else name == one for one in ATTRIBUTES.get(module, ()))
