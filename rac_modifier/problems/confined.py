"""Run a program that nobody has read, without what the kernel lets us take away. A script: Python runs it alone, without site.

Its arguments are a JSON object of limits and the words of the command, which replaces this process. In this order:

1. limits: processor time, address space, size of a file, open files, threads, no core file (setrlimit). They hold everywhere.
2. no new rights by executing something (PR_SET_NO_NEW_PRIVS), no capabilities where the user is root, and the end of the process
   when the one that started it ends (PR_SET_PDEATHSIG).
3. files (Landlock, Linux 6.2): read below Python's folders and the system's libraries, written below the current folder only.
4. system calls (seccomp, x86-64 only): no new process, no socket, no signal to others, no new session or group, no debugging
   of other processes, no namespace, no mount, no change of the rights, owners and times of files. Threads are allowed.

What the kernel refuses of 3 and 4 is left out and said: with `report` among the limits, the parts that hold are written to
standard output before the command is run. Not confined in any case: how many files are written within the time, and what is
read in the folders above.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 24, 38, 22
_FILTER = 2  # SECCOMP_MODE_FILTER
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = (
    444,
    445,
    446,
)  # Landlock's system calls, on every architecture
_X86_64 = 0xC000003E  # AUDIT_ARCH_X86_64
_EPERM, _ENOSYS = 1, 38
_CLONE, _CLONE3, _PRLIMIT = 56, 435, 302
_CLONE_THREAD = 0x10000
# By what they would do.
_DENIED = (
    *(57, 58),  # fork, vfork
    *(41, 42, 49, 53),  # socket, connect, bind, socketpair
    *(
        62,
        129,
        200,
        234,
        297,
        424,
        434,
        438,
    ),  # kill, (rt_)(tg)(t)sigqueueinfo, tkill, tgkill, pidfd_*
    *(109, 112),  # setpgid, setsid: out of the group that is ended
    *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
    *(155, 161, 165, 166, 272, 308, 428, 429, 430, 431, 432, 442),  # mounts, chroot, unshare, setns
    *(425, 426, 427),  # io_uring, which could open sockets
    *(90, 91, 268, 452, 92, 93, 94, 260),  # chmod and chown, which Landlock does not hold
    *(
        132,
        235,
        261,
        280,
        188,
        189,
        190,
        197,
        198,
        199,
        463,
        466,
    ),  # times and extended attributes of files, likewise
    *(248, 249, 250, 298, 321, 323),  # keys, perf_event_open, bpf, userfaultfd
)
# Landlock: rights by the version of its interface that knows them.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_VERSIONS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 5: 0xFFFF}
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")


def limit(limits: dict[str, int]) -> None:
    """Set the limits, the hard ones too; a lower one that is set already stays."""
    wanted = {
        resource.RLIMIT_CPU: limits["seconds"],
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["file"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 1024,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in wanted.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def give_up_rights(libc: ctypes.CDLL, parent: int) -> None:
    """No capability for root, no new rights for anybody, and no life without the parent."""
    if os.geteuid() == 0:
        for capability in range(64):
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError("PR_SET_NO_NEW_PRIVS is refused")
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def confine_files(libc: ctypes.CDLL, folder: str) -> bool:
    """Reading of Python and libraries, writing of one folder, by Landlock; False where the kernel has none, or one before
    Linux 6.2, which lets a program empty files elsewhere.
    """
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    handled = _VERSIONS[max(known for known in _VERSIONS if known <= version)]
    attributes = ctypes.create_string_buffer(struct.pack("Q", handled))
    rules = libc.syscall(_CREATE_RULESET, attributes, 8, 0)
    if rules < 0:
        return False
    readable = _READ_FILE | _READ_DIR | _EXECUTE
    allowed = dict.fromkeys(
        [*_SYSTEM, sys.base_prefix, os.path.dirname(os.path.abspath(__file__))], readable
    )
    allowed |= {folder: handled & ~_EXECUTE} | dict.fromkeys(_DEVICES, _READ_FILE | _WRITE_FILE)
    for path, rights in allowed.items():
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # a system without it
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE | _EXECUTE
        beneath = ctypes.create_string_buffer(struct.pack("=Qi", rights & handled, opened))
        added = libc.syscall(_ADD_RULE, rules, 1, beneath, 0)
        os.close(opened)
        if added:
            raise OSError(f"Landlock refuses the rule of {path}")
    if libc.syscall(_RESTRICT_SELF, rules, 0):
        return False
    os.close(rules)
    return bool(version >= 3)


def system_call_filter() -> bytes:
    """The filter as instructions of classic BPF: code, jump if true, jump if false, value."""
    load, equal, at_least, has_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, unknown = 0x7FFF0000, 0x00050000 | _EPERM, 0x00050000 | _ENOSYS
    program = [(load, 0, 0, 4), (equal, 1, 0, _X86_64), (give, 0, 0, deny), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, deny)]  # the x32 names of the same calls
    for number in _DENIED:
        program += [(equal, 0, 1, number), (give, 0, 0, deny)]
    program += [
        (equal, 0, 1, _CLONE3),
        (give, 0, 0, unknown),
    ]  # the C library then uses clone, whose flags can be read
    program += [
        (equal, 0, 4, _CLONE),
        (load, 0, 0, 16),
        (has_bits, 0, 1, _CLONE_THREAD),
        (give, 0, 0, allow),
    ]
    program += [(give, 0, 0, deny)]
    # prlimit64 of this process (first argument 0) cannot raise a hard limit; of another one it could end it
    program += [
        (equal, 0, 3, _PRLIMIT),
        (load, 0, 0, 16),
        (equal, 1, 0, 0),
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def confine_system_calls(libc: ctypes.CDLL) -> bool:
    """Filter system calls; False on another architecture than x86-64, or where the kernel refuses."""
    if platform.machine() != "x86_64" or struct.calcsize("P") != 8:
        return False
    instructions = system_call_filter()
    code = ctypes.create_string_buffer(instructions)
    program = ctypes.create_string_buffer(
        struct.pack("HP", len(instructions) // 8, ctypes.addressof(code))
    )
    return libc.prctl(_PR_SET_SECCOMP, _FILTER, program, 0, 0) == 0


def main() -> None:
    """Confine this process, and become the command."""
    limits, command = json.loads(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    limit(limits)
    give_up_rights(libc, limits["parent"])
    holds = {"files": confine_files(libc, os.getcwd()), "system_calls": confine_system_calls(libc)}
    if limits.get("report"):
        print(json.dumps(holds), flush=True)
    os.execve(command[0], command, {})


if __name__ == "__main__":
    main()
