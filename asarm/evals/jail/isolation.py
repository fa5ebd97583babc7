"""The walls: namespaces, a root of its own, no privileges, resource limits; the Linux calls that Python lacks."""

import ctypes
import os
import resource
import signal
import struct

NOBODY = 65534
MEMORY_DISK = b"size=16m,nr_inodes=1k,mode=0755"

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 1, 2
CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def _check(status: int, what: str) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _prctl(option: int, value: int) -> None:
    _check(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def adopt_orphans() -> None:
    """Processes below this one that lose their parent become this one's children."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(signal_number: int) -> None:
    """Be sent a signal when the parent ends. (A change of user clears this.)"""
    _prctl(PR_SET_PDEATHSIG, signal_number)


def undumpable() -> None:
    """No other process of this user may trace this one, or read its memory, files or arguments."""
    _prctl(PR_SET_DUMPABLE, 0)


def enter_namespaces() -> None:
    """Network, IPC and host name of its own for this process, process numbers for its children. Without root's rights
    that takes a user namespace, in which this user is nobody but himself."""
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    _check(libc.unshare(flags if uid == 0 else flags | CLONE_NEWUSER), "unshare")
    if uid != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def private_root(folder: str, visible: list) -> None:
    """Make ``folder`` the root directory: a disk in memory with ``visible`` (read-only) and an empty /work, where this
    process goes. There is no /proc, no /dev, no home. To all other processes the folder stays empty."""
    _check(libc.unshare(CLONE_NEWNS), "unshare mounts")
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, MEMORY_DISK)
    for path in visible:
        inside = folder + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
        else:
            os.makedirs(inside, exist_ok=True)
            _mount(path, inside, None, MS_BIND | MS_REC)
            _make_read_only(inside)
    os.mkdir(folder + "/work")
    os.chmod(folder + "/work", 0o777)
    os.chroot(folder)  # no way out without capabilities, and no user namespace for a process that is chrooted
    os.chdir("/work")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: bytes | None = None) -> None:
    source, kind = (text and text.encode() for text in (source, kind))
    _check(libc.mount(source, target.encode(), kind, ctypes.c_ulong(flags), options), f"mount {target}")


def _make_read_only(target: str) -> None:
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    status = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, size)
    _check(status, f"mount_setattr {target}")


def drop_privileges() -> None:
    """Root becomes nobody; no capabilities, and no set-uid program gives any back."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _check(libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()), "capset")
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    end_with_parent(signal.SIGKILL)


def limit_resources(settings: dict) -> None:
    """Limits of the referee and of the candidate, each: CPU seconds, memory and file bytes, open files."""
    cpu, memory, file_size = settings["cpu"], settings["memory"], settings["file_size"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
