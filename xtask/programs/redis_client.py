"""A client of redis that always has a batch of commands on its way: python3 redis_client.py SOCKET STOP-FILE."""

import os
import socket
import sys
import time

BATCH = 50
KEYS = 100000


def command(*words):
    parts = [b"$%d\r\n%s\r\n" % (len(word), word) for word in (str(word).encode() for word in words)]
    return b"*%d\r\n" % len(parts) + b"".join(parts)


connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
answers = connection.makefile("rb")
count = 0
while not os.path.exists(sys.argv[2]):
    numbers = [(count * 7919 + n * 104729) % KEYS for n in range(BATCH)]
    connection.sendall(b"".join(command("INCR", "counter") + command("GET", f"key:{n}") for n in numbers))
    for number in numbers:
        count += 1
        expected = [b":%d\r\n" % count, None, b"value:%d\r\n" % number]
        for line in expected:
            answer = answers.readline()
            assert line is None or answer == line, (answer, line)
    time.sleep(0.1)
print("right answers", count, flush=True)
