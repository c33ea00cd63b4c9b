"""Run ``sardonyx`` where the kernel ends the process if it so much as tries to reach another one.

No ``connect``, no ``sendto`` with an address: of sockets there remain those that listen, and what they accept. It holds
for every thread and library of the process. Linux, x86-64 and aarch64.

Source: Linux, Documentation/userspace-api/seccomp_filter.rst; include/uapi/linux/{seccomp,filter,audit,prctl}.h.
"""

import ctypes
import platform
import struct
import sys

PLATFORMS = {"x86_64": (0xC000003E, 42, 44), "aarch64": (0xC00000B7, 203, 206)}
"""Audit's number of the architecture, and the numbers of connect and sendto."""
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER, _ARCHITECTURE, _FIFTH_ARGUMENT = 0, 4, 48
"""Where they lie in ``struct seccomp_data``; of the argument the lower half."""
_ALLOW, _KILL_PROCESS = 0x7FFF0000, 0x80000000
_SET_SECCOMP, _SET_NO_NEW_PRIVILEGES, _FILTER = 22, 38, 2


def forbid_connections() -> None:
    architecture, connect, sendto = PLATFORMS[platform.machine()]
    instructions = [  # code, operand, instructions to skip if true, and if false
        (_LOAD, _ARCHITECTURE, 0, 0),
        (_JUMP_IF_EQUAL, architecture, 0, 5),
        (_LOAD, _NUMBER, 0, 0),
        (_JUMP_IF_EQUAL, connect, 3, 0),
        (_JUMP_IF_EQUAL, sendto, 0, 3),
        (_LOAD, _FIFTH_ARGUMENT, 0, 0),
        (_JUMP_IF_EQUAL, 0, 1, 0),  # no address: to whom it is connected
        (_RETURN, _KILL_PROCESS, 0, 0),
        (_RETURN, _ALLOW, 0, 0),
    ]
    code = b"".join(struct.pack("HBBI", code, *jumps, operand) for code, operand, *jumps in instructions)
    program = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HP", len(instructions), ctypes.addressof(program)))
    library = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, ctypes.byref(header), 0, 0)):
        if library.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid_connections()
    from sardonyx.cli import main

    main(sys.argv[1:])
