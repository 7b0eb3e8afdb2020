"""The inner side of the sandbox. A script: one JSON object on stdin, one on stdout; it uses the standard library only and is never imported.

    stdin    {"parent", "namespaces", "files": {NAME: TEXT}, "visible": [PATH], "environment": {}, "processes", "open_files", "memory_bytes",
              "disk_bytes", "file_bytes", "output_bytes",
              "commands": [{"arguments": [...], "cpu_seconds", "wall_seconds", "address_bytes": number or null}]}
    stdout   {"refused": WHY} where the sandbox cannot be built, or
             {"outcomes": [{"status", "reason", "output", "seconds"}]}, of the commands up to the first that fails

With namespaces, this process enters new ones of user, mount, PID, network, IPC and host name, and forks. The fork is process 1 there: it builds
a root folder of its own from read-only views of what is visible, an empty /proc and five devices, and a /scratch in memory; it starts the commands
there without any capability, watches them, and when it ends the kernel kills whatever they have started. Each process dies with its parent.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback

NOBODY = 65534
INSIDE_USER = 1000  # of the programs; not 0: who is root in a user namespace has capabilities there after execve
# <sched.h>, <sys/mount.h>, <sys/prctl.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "ppc64le": 203}
DEVICES = ("null", "zero", "full", "random", "urandom")
LOOK_SECONDS = 0.02
libc = ctypes.CDLL(None, use_errno=True)


def check(result, name):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def die_with_parent(parent):
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if parent and os.getppid() != parent:
        os._exit(1)


def enter_namespaces():
    """User ids inside: whoever runs this is 1000; or root is 0, to build the view, and nobody is 1000, for the programs."""
    user, group = os.geteuid(), os.getegid()
    maps = [f"{INSIDE_USER} {outside} 1\n" for outside in ((user, group) if user else (NOBODY, NOBODY))]
    if user == 0:
        maps = ["0 0 1\n" + line for line in maps]
    # Only who has capabilities outside may map a second user, and this process has lost them after unshare.
    reader, writer = os.pipe()
    mapper = 0 if user else os.fork()
    if user == 0 and mapper == 0:
        os.close(writer)
        os._exit(write_maps(os.getppid(), maps) if os.read(reader, 1) else 1)
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    check(libc.unshare(flags), "unshare of the user, mount, PID, network, IPC and host name namespaces")
    if user:
        with open("/proc/self/setgroups", "w") as file:
            file.write("deny")
        write_maps(os.getpid(), maps)
        return
    os.write(writer, b"x")
    if os.waitpid(mapper, 0)[1]:
        raise PermissionError(errno.EPERM, "users cannot be mapped into a user namespace")


def write_maps(process, maps):
    for name, lines in zip(("uid_map", "gid_map"), maps, strict=True):
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(lines)
    return 0


def mount(source, target, kind, flags, data=""):
    check(libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()), f"mount of {target}")


def build_root(visible, disk_bytes):
    """Makes / a new file system that has the visible paths, read-only, and /scratch, which alone can be written."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    check(libc.syscall(PIVOT_ROOT[os.uname().machine], b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    os.makedirs("/proc")
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.mkdir("/scratch", 0o755)
    mount("tmpfs", "/scratch", "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},nr_inodes=20000,mode=755")
    os.mkdir("/scratch/tmp")
    os.symlink("scratch/tmp", "/tmp")
    for path in [*visible, *(f"/dev/{name}" for name in DEVICES)]:
        show(path)
    os.symlink("/proc/self/fd", "/dev/fd")
    check(libc.umount2(b"/old", MNT_DETACH), "umount of the old root")
    os.rmdir("/old")
    mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:  # no program gets capabilities in one of its own
        file.write("0")


def show(path):
    """The old root's `path` at the same place, read-only with all that is mounted below it."""
    old = "/old" + path
    if os.path.islink(old):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(os.readlink(old), path)
        return
    if not os.path.lexists(old) or os.path.lexists(path):
        return
    if os.path.isdir(old):
        os.makedirs(path)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()
    mount(old, path, "", MS_BIND | MS_REC)
    if path.startswith("/dev/"):
        return
    with open("/proc/self/mountinfo") as file:
        places = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in file]
    for place in places:
        if place == path or place.startswith(path + "/"):
            # Flags that the outer namespace has set may not be taken away. Those of statvfs are the mount's own, but for RELATIME.
            kept = os.statvfs(place).f_flag & (MS_NODEV | MS_NOEXEC | 1024 | 2048)
            mount("none", place, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)


def start(command, spec, output, failure):
    """Forks the command. Everything that it is not to have is taken from it before execve. What hinders that is written to `failure`."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        capability = 0
        while spec["namespaces"] and libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
            capability += 1
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(*[spec["user"]] * 3)
            os.setresuid(*[spec["user"]] * 3)
        null = os.open("/dev/null", os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.dup2(os.dup(failure), 3, inheritable=False)
        os.closerange(4, 65536)
        limits = {
            resource.RLIMIT_CPU: command["cpu_seconds"],
            resource.RLIMIT_DATA: spec["memory_bytes"],
            resource.RLIMIT_FSIZE: spec["file_bytes"],
            resource.RLIMIT_NOFILE: spec["open_files"],
            resource.RLIMIT_NPROC: spec["process_limit"],
            resource.RLIMIT_CORE: 0,
        } | ({resource.RLIMIT_AS: command["address_bytes"]} if command["address_bytes"] else {})
        for name, number in limits.items():
            resource.setrlimit(name, (number, number + (name == resource.RLIMIT_CPU)))  # a signal of its own, and a second later SIGKILL
        check(libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")  # else its files in /proc are root's
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if the machine runs out of memory, this goes first
        check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
        os.execvpe(command["arguments"][0], command["arguments"], spec["environment"])
    except BaseException as error:
        os.write(3, f"{command['arguments'][0]}: {error}".encode())
    finally:
        os._exit(127)


def descendants():
    """Process id -> bytes of memory of its own, of all processes below this one."""
    parents, memory = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/status") as file:
                fields = dict(line.split(":", 1) for line in file if ":" in line)
        except OSError:
            continue
        parents[int(name)] = int(fields["PPid"])
        memory[int(name)] = sum(int(fields.get(key, "0 kB").split()[0]) for key in ("RssAnon", "RssShmem")) * 1024
    below = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return {process: memory[process] for process in below - {os.getpid()}}


def kill_all(namespaces):
    """Kills whatever the commands have started, and waits for it."""
    while True:
        if namespaces and os.getpid() == 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            for process in descendants():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def run(command, spec):
    """One command to its end, or to a limit."""
    reader, writer = os.pipe()
    why, failure = os.pipe()
    began = time.monotonic()
    child = start(command, spec, writer, failure)
    os.close(writer)
    os.close(failure)
    with os.fdopen(why) as file:
        hindered = file.read()  # until execve closes it
    head, tail, half = b"", b"", spec["output_bytes"] // 2
    status, reason, looked = None, "", 0.0
    while status is None and not reason:
        if select.select([reader], [], [], LOOK_SECONDS)[0]:
            text = os.read(reader, 65536)
            taken = half - len(head)
            head, tail = head + text[:taken], (tail + text[taken:])[-half:]
            if not text:
                time.sleep(LOOK_SECONDS)
        status = reap(child)
        if time.monotonic() - began > command["wall_seconds"]:
            reason = "wall clock"
        elif time.monotonic() - looked > 2 * LOOK_SECONDS:
            looked = time.monotonic()
            if sum(descendants().values()) > spec["memory_bytes"]:
                reason = "memory"
    if status is not None:
        reason = "not started" if hindered else "CPU time" if status == -signal.SIGXCPU else ""
    kill_all(spec["namespaces"])
    while text := os.read(reader, 65536):  # nobody is left who could write
        taken = half - len(head)
        head, tail = head + text[:taken], (tail + text[taken:])[-half:]
    os.close(reader)
    status = -signal.SIGKILL if status is None else status
    output = hindered or (head + tail).decode(errors="replace")
    return {"status": status, "reason": reason, "output": output, "seconds": time.monotonic() - began}


def reap(child):
    """The child's status as subprocess has it, or None while it runs. Orphans are buried on the way."""
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if process == 0:
            return None
        if process == child:
            return os.waitstatus_to_exitcode(status)


def threads_of(user):
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            count += len(os.listdir(f"/proc/{name}/task")) if os.stat(f"/proc/{name}").st_uid == user else 0
    return count


def run_all(spec):
    for name, text in spec["files"].items():
        os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
    if os.geteuid() == 0:
        for folder, _, names in os.walk("."):
            for name in ["", *names]:
                os.chown(os.path.join(folder, name), spec["user"], spec["user"])
    outcomes = []
    for command in spec["commands"]:
        outcomes.append(run(command, spec))
        if outcomes[-1]["status"]:
            break
    return outcomes


def in_namespaces(spec):
    enter_namespaces()
    die_with_parent(spec["parent"])
    spec["user"] = INSIDE_USER
    spec["process_limit"] = spec["processes"] + (2 if os.geteuid() else 0)  # counted in the namespace: this process and process 1 as well
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            die_with_parent(0)
            check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")  # nobody looks into this process
            try:
                build_root(spec["visible"], spec["disk_bytes"])
                os.chdir("/scratch")
            except (OSError, KeyError) as error:
                result = {"refused": str(error)}
            else:
                result = {"outcomes": run_all(spec)}
            with os.fdopen(writer, "w") as file:
                json.dump(result, file)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text)


def with_limits_only(spec):
    """No network is cut off and no file hidden: for a machine that is a sandbox itself."""
    folder = tempfile.mkdtemp(prefix="code-")
    try:
        supervisor = os.fork()
        if supervisor == 0:
            try:
                die_with_parent(0)
                check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")
                spec["user"] = os.geteuid() or NOBODY
                spec["process_limit"] = spec["processes"] + threads_of(spec["user"])  # counted for the user
                spec["environment"] |= {"HOME": folder, "TMPDIR": folder}
                os.chdir(folder)
                print(json.dumps({"outcomes": run_all(spec)}), flush=True)
            finally:
                os._exit(0)
        os.waitpid(supervisor, 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main():
    spec = json.load(sys.stdin)
    die_with_parent(spec["parent"])
    if not spec["namespaces"]:
        with_limits_only(spec)
        return
    try:
        result = in_namespaces(spec)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSPC, errno.ENOSYS, errno.EUSERS):
            raise
        result = {"refused": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
