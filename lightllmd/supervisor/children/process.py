"""One operating-system process below us: started, watched through its pidfd, its output read line by line."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from lightllmd.config.push import PASSWORD
from lightllmd.errors import SystemFailure
from lightllmd.ipc.child_setup import die_with_parent
from lightllmd.supervisor.host.orphans import kill_group
from lightllmd.supervisor.journal.output import OutputLines

FLOOD_PAUSE = 0.01  # seconds between two reads of 64 KiB from a process that prints too much
MOST_CAPTURED = 256 << 20  # bytes of stdout that are kept; what is cut off is no JSON, and is told as such
LAST_WORDS = 1 << 20  # bytes read at most of what a dead process left in its pipe
# Said to us by systemd, not to our children; and the gateway's password, which one of them is told.
_OURS_ALONE = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", PASSWORD)


# CUDA numbers GPUs as NVML and nvidia-smi do: a plan's numbers are the same to the probe and to the engines.
NUMBERED_ALIKE = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` less what is for us alone; Python's output in it is not buffered."""
    inherited = {name: value for name, value in environment.items() if name not in _OURS_ALONE}
    return {**NUMBERED_ALIKE, **inherited, "PYTHONUNBUFFERED": "1"}


class Process:
    """Leads a session and process group of its own. `on_exit` and `on_output` are called from the loop.

    `capture` keeps stdout apart (`captured`) and gives `on_output` stderr only. `tied` arms the death of the child
    with ours before it runs anything; those that call `ipc.child.adopt` do that themselves, more cheaply. Raises
    SystemFailure where the host refuses (no process, memory or descriptor left); nothing is left open then.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        on_exit: Callable[[], None],
        on_output: Callable[[str], None],
        pass_fds: Sequence[int] = (),
        stdin: bytes | None = None,
        capture: bool = False,
        tied: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit
        self._pipes: list[int] = []
        self._output = OutputLines(on_output)
        self.captured: bytearray | None = None
        self._capturing = -1  # the descriptor that goes there
        writers: list[int] = []
        try:
            errors, writer = os.pipe2(os.O_CLOEXEC)
            self._pipes.append(errors)
            writers.append(writer)
            if capture:
                output, out_writer = os.pipe2(os.O_CLOEXEC)
                self._pipes.append(output)
                self.captured, self._capturing = bytearray(), output
                writers.append(out_writer)
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                bufsize=0,
                stdout=writers[-1],
                stderr=writers[0],
                pass_fds=pass_fds,
                start_new_session=True,
                env=child_environment(os.environ),
                preexec_fn=partial(die_with_parent, os.getpid()) if tied else None,
            )
            try:
                self._pidfd = os.pidfd_open(self._popen.pid)
            except OSError:
                self._popen.kill()
                self._popen.wait()
                raise
        except OSError as refused:
            for fd in self._pipes:
                os.close(fd)
            raise SystemFailure(f"can't start {command[0]}: {refused}") from refused
        finally:
            for fd in writers:
                os.close(fd)
        self._stdin = memoryview(stdin or b"")  # what is still to be written
        if self._popen.stdin is not None:
            os.set_blocking(self._popen.stdin.fileno(), False)
            self._feed()
        for fd in self._pipes:
            os.set_blocking(fd, False)
            self._listen(fd)
        self._loop.add_reader(self._pidfd, self._exited)
        _restore_oom_score(self.pid)

    @property
    def pid(self) -> int:
        """Stays its own until it is reaped."""
        return self._popen.pid

    def reap(self) -> int | None:
        """The return code as of subprocess, None while it runs. What is left of its group dies with it."""
        if self._popen.returncode is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            kill_group(self.pid)  # before the reaping: from then on the number may be another's
            self._popen.poll()
        return self._popen.returncode

    def send_signal(self, number: int) -> None:
        """To this very process, even if its number was given to another meanwhile; SIGKILL to its whole group."""
        if self._popen.returncode is not None:
            return
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return
        if number == signal.SIGKILL:
            kill_group(self.pid)

    def dispose(self) -> None:
        """After its death: reads its last words, lets go of every descriptor."""
        if self._popen.stdin is not None and not self._popen.stdin.closed:
            self._loop.remove_writer(self._popen.stdin.fileno())
            self._popen.stdin.close()
        for fd in self._pipes:
            for _ in range(LAST_WORDS >> 16):
                if not self._read(fd):
                    break
            self._loop.remove_reader(fd)
            os.close(fd)
        self._output.end()
        self._pipes.clear()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)  # readable for ever from now on
        self._on_exit()

    def _feed(self) -> None:
        """As much of its stdin as it takes now, the rest when it has read that."""
        assert self._popen.stdin is not None
        fd = self._popen.stdin.fileno()
        self._loop.remove_writer(fd)
        try:
            self._stdin = self._stdin[os.write(fd, self._stdin) :]
        except BlockingIOError:
            pass
        except OSError:
            self._stdin = self._stdin[:0]  # it is dead already; its exit tells why
        if self._stdin:
            self._loop.add_writer(fd, self._feed)
        else:
            self._popen.stdin.close()

    def _listen(self, fd: int) -> None:
        if fd in self._pipes:
            self._loop.add_reader(fd, self._readable, fd)

    def _readable(self, fd: int) -> None:
        if self._read(fd) and self._output.flooded:
            # The writer is slowed down to some MB/s, or dropping what it prints would take a core.
            self._loop.remove_reader(fd)
            self._loop.call_later(FLOOD_PAUSE, self._listen, fd)

    def _read(self, fd: int) -> bool:
        """What is there now, up to 64 KiB: one worker that prints without end must not keep the loop.

        True when there may be more.
        """
        try:
            chunk = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        if not chunk:
            self._loop.remove_reader(fd)
            return False
        if self.captured is not None and fd == self._capturing:
            if len(self.captured) < MOST_CAPTURED:
                self.captured += chunk
        else:
            self._output.feed(chunk, time.monotonic())
        return True


def _restore_oom_score(pid: int) -> None:
    """A unit may protect the supervisor from the kernel's memory killer; its workers are not worth that."""
    try:
        with open("/proc/self/oom_score_adj") as own:
            if int(own.read()) >= 0:
                return
        with open(f"/proc/{pid}/oom_score_adj", "w") as theirs:
            theirs.write("0")
    except OSError:
        return  # dead already, or a kernel that hides it: nothing depends on it
