"""The filter of system calls, interpreted here; that the kernel holds it is tested in test_programs.py."""

import struct

import pytest

from rac_modifier.problems import confined

ALLOWED, DENIED, UNKNOWN = 0x7FFF0000, 0x00050001, 0x00050026
X86_64 = 0xC000003E
READ, WRITE, MMAP, EXECVE, FUTEX = 0, 1, 9, 59, 202
FORK, VFORK, CLONE, CLONE3, SOCKET, CONNECT, KILL, SETSID, PTRACE, UNSHARE, IO_URING_SETUP = (
    57, 58, 56, 435, 41, 42, 62, 112, 101, 272, 425,
)  # fmt: skip
THREAD = 0x003D0F00  # the flags of pthread_create
CHILD = 0x01200011  # the flags of fork


def verdict(number: int, *arguments: int, architecture: int = X86_64) -> int:
    """Interpret the filter on a call, as the kernel's seccomp(2) does."""
    data = struct.pack("IIQ6Q", number, architecture, 0, *(*arguments, *[0] * (6 - len(arguments))))
    code = list(struct.iter_unpack("HBBI", confined.system_call_filter()))
    place = accumulator = 0
    while True:
        operation, if_true, if_false, value = code[place]
        place += 1
        if operation == 0x06:
            return value
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("I", data, value)
            continue
        holds = {
            0x15: accumulator == value,
            0x35: accumulator >= value,
            0x45: bool(accumulator & value),
        }[operation]
        place += if_true if holds else if_false


@pytest.mark.parametrize("number", [READ, WRITE, MMAP, EXECVE, FUTEX, 231, 257, 318, 334])
def test_what_a_program_needs_is_allowed(number):
    assert verdict(number) == ALLOWED


@pytest.mark.parametrize(
    "number",
    [
        FORK,
        VFORK,
        SOCKET,
        CONNECT,
        KILL,
        200,
        234,
        90,
        92,
        188,
        280,
        SETSID,
        109,
        PTRACE,
        310,
        311,
        UNSHARE,
        308,
        165,
        IO_URING_SETUP,
    ],
)
def test_what_reaches_beyond_the_process_is_denied(number):
    assert verdict(number) == DENIED
    assert verdict(number | 0x40000000) == DENIED, "its x32 name"


def test_threads_and_no_processes():
    assert verdict(CLONE, THREAD) == ALLOWED
    assert verdict(CLONE, CHILD) == DENIED
    assert verdict(CLONE3, 1) == UNKNOWN, "its flags cannot be read; the C library tries clone then"


def test_limits_of_this_process_and_not_of_others():
    assert verdict(302, 0, 7, 1) == ALLOWED
    assert verdict(302, 4321, 7, 1) == DENIED


def test_another_architecture_is_denied_whole():
    assert verdict(READ, architecture=0x40000003) == DENIED
