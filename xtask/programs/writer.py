"""Writes the numbers from 1 on into a database, and the last one that was acknowledged into a file in memory; or counts what is there.

usage: writer.py KIND PLACE ACKED | writer.py KIND PLACE
"""

import os
import socket
import sqlite3
import subprocess
import sys

PSQL = ["psql", "-X", "-q", "-A", "-t", "-d", "postgres"]


def sqlite(place, journal):
    db = sqlite3.connect(place, isolation_level=None)
    db.execute(f"PRAGMA journal_mode={journal}")
    db.execute("PRAGMA synchronous=OFF")
    db.execute("CREATE TABLE IF NOT EXISTS numbers (n INTEGER PRIMARY KEY, text TEXT)")
    return lambda n: db.execute("INSERT INTO numbers VALUES (?, ?)", (n, "x" * (n % 700)))


def sqlite_count(place):
    db = sqlite3.connect(place)
    (verdict,) = db.execute("PRAGMA integrity_check").fetchone()
    if verdict != "ok":
        sys.exit(f"the database is damaged: {verdict}")
    return db.execute("SELECT count(*), max(n) FROM numbers").fetchone()


def connect(place):
    client = socket.socket(socket.AF_UNIX)
    client.connect(place)
    return client, client.makefile("rb")


def redis(place):
    client, replies = connect(place)

    def put(n):
        client.sendall(b"RPUSH numbers %d\r\n" % n)
        reply = replies.readline()
        if reply != b":%d\r\n" % n:
            sys.exit(f"redis answers {reply!r} to {n}")

    return put


def redis_count(place):
    client, replies = connect(place)
    client.sendall(b"LLEN numbers\r\nLINDEX numbers -1\r\n")
    count = int(replies.readline()[1:])
    replies.readline()
    return count, int(replies.readline())


def postgres(_):
    psql = subprocess.Popen(PSQL, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    psql.stdin.write(b"CREATE TABLE numbers (n INT PRIMARY KEY);\n")

    def put(n):
        psql.stdin.write(b"INSERT INTO numbers VALUES (%d) RETURNING n;\n" % n)
        psql.stdin.flush()
        reply = psql.stdout.readline()
        if reply != b"%d\n" % n:
            sys.exit(f"postgres answers {reply!r} to {n}")

    return put


def postgres_count(_):
    query = "SELECT count(*), max(n) FROM numbers"
    out = subprocess.run([*PSQL, "-F", " ", "-c", query], stdout=subprocess.PIPE, check=True)
    return tuple(map(int, out.stdout.split()))


KINDS = {
    "sqlite-wal": (lambda place: sqlite(place, "WAL"), sqlite_count),
    "sqlite-rollback": (lambda place: sqlite(place, "DELETE"), sqlite_count),
    "redis": (redis, redis_count),
    "postgres": (postgres, postgres_count),
}


def main():
    kind, place, *acked = sys.argv[1:]
    write, count = KINDS[kind]
    if not acked:
        print(*count(place))
        return
    put = write(place)
    file = os.open(acked[0], os.O_CREAT | os.O_RDWR, 0o644)
    n = 0
    while True:
        n += 1
        put(n)
        os.pwrite(file, b"%012d" % n, 0)


main()
