"""Frees a lock of the C library that a fork copied while another thread held it.

glibc protects its list of network interfaces with a lock, and does not free the lock in a forked child. `getaddrinfo`
takes it whenever the flag ``AI_ADDRCONFIG`` is set, as librdkafka does at each connection. If a thread of librdkafka is
in there at the moment of a fork, every connection that the child opens waits forever: its records time out, and its
clients cannot be closed.

The lock has no name and no function that would free it. But in a child that has just been forked no thread can hold it.
So `free` looks a name up in a new thread. If that thread waits for a futex of the C library, the futex is the lock.
Tried with glibc 2.36. With another C library the look-up simply returns.
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import re
import sys
import threading
import time

from jobledger.process import greenlets

#: Seconds between two looks at the thread. A lock is freed only if the thread waits for it at two looks in a row.
LOOK_S = 0.005
#: Seconds after which the thread is left alone.
MOST_S = 2.0

#: The operations of a futex, both for threads of one process, and the value of a lock for which a thread waits.
_WAIT, _WAKE, _WAITED_FOR = 128, 129, 2

#: A line of ``/proc/self/maps``: begin, end, whether it can be read and written, and the name.
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (..)\S+ \S+ \S+ \S+ *(.*)$", re.MULTILINE)
_LIBC = re.compile(r"/libc[.-][^/]*$")


def free() -> bool:
    """Free the lock if the fork copied it while it was held. Return whether names can be looked up now.

    Call this in a forked child, before it starts a thread. The call takes the time of one look-up of a number: a
    fraction of a millisecond, or some ten milliseconds if the lock was held.
    """
    if sys.platform != "linux":
        return True
    native_ids: list[int] = []
    ended: list[bool] = []

    def look_up() -> None:
        native_ids.append(threading.get_native_id())
        # As bytes: for a text, Python would import the codec for names, under a lock of its own.
        with contextlib.suppress(OSError):  # there is no network at all: not a matter of the lock
            _socket.getaddrinfo(b"127.0.0.1", 0, type=_socket.SOCK_STREAM, flags=_socket.AI_ADDRCONFIG)
        ended.append(True)

    try:
        thread = greenlets.start_thread(look_up, "jobledger-look-up")
    except RuntimeError:  # no thread can be started, so no Kafka client can be, either
        return False
    waited: tuple[int, int] | None = None
    deadline = time.monotonic() + MOST_S
    while not ended and time.monotonic() < deadline:
        thread.join(LOOK_S)
        before, waited = waited, None if ended or not native_ids else _awaited(native_ids[0])
        if waited is not None and waited == before:
            _release(*waited)
    return bool(ended)


def _awaited(native_id: int) -> tuple[int, int] | None:
    """Return the number of the system call in which a thread waits, and the address of the lock of the C library for
    which it waits; None if it does not wait for such a lock."""
    try:
        with open(f"/proc/self/task/{native_id}/syscall", encoding="ascii") as file:
            words = file.read().split()
        number, address, operation, value = int(words[0]), *(int(word, 16) for word in words[1:4])
    except (OSError, ValueError, IndexError):  # the thread runs or has ended, or the system does not tell
        return None
    is_lock = (operation, value & 0xFFFFFFFF) == (_WAIT, _WAITED_FOR) and _of_libc(address)
    return (number, address) if is_lock else None


def _of_libc(address: int) -> bool:
    """Return whether an address is in the C library's writable data. Its last part is in a mapping without a name that
    follows directly."""
    end = 0  # of the mapping before, if that belongs to the C library
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for first, last, mode, name in _MAPPING.findall(maps.read()):
            begin = int(first, 16)
            if not (_LIBC.search(name) or (begin == end and not name)):
                end = 0
                continue
            end = int(last, 16)
            if begin <= address < end:
                return bool(mode == "rw")
    return False


def _release(number: int, address: int) -> None:
    ctypes.c_int.from_address(address).value = 0
    ctypes.CDLL(None).syscall(number, ctypes.c_void_p(address), _WAKE, 1, None, None, 0)
