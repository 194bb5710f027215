"""Types into a session of tmux, as somebody at a terminal would: python3 typist.py SESSION. Ends when SESSION.stop is there, or the session."""

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time

session = sys.argv[1]
pid, terminal = pty.fork()
if pid == 0:
    os.environ["TERM"] = "xterm"
    os.execvp("tmux", ["tmux", "-L", "apps", "attach", "-t", "=" + session])
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))


def show(seconds):
    """Reads what the terminal would show, for that long."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            os.read(terminal, 65536)


count = 0
try:
    show(2)
    while not os.path.exists(session + ".stop"):
        os.write(terminal, b"word%d " % (count + 1))
        count += 1
        show(0.3)
    print("typed", count, flush=True)
    while True:
        show(1)
except OSError:
    print("ended at", count, flush=True)
