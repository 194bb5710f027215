"""Eight clients that write and read ten MEMORY tables, and know what the server has acknowledged: python3 ledger.py SOCKET STOP-FILE."""

import json
import os
import sys
import threading
import time

import pymysql

socket, stop = sys.argv[1:]
WORKERS = 8
TABLES = 10
acknowledged = [0] * WORKERS
errors = [0] * WORKERS
wrong = []


def connect():
    return pymysql.connect(unix_socket=socket, user="app", password="app", database="apps", charset="utf8mb4", autocommit=True)


def again(worker):
    """Connects until it succeeds: the server may be away for a while."""
    while True:
        try:
            return connect()
        except (pymysql.err.Error, OSError):
            time.sleep(0.2)


def has(cursor, table, worker, n):
    cursor.execute(f"SELECT txt FROM t{table} WHERE worker = %s AND n = %s", (worker + 1, n))
    return cursor.fetchone()


def work(worker):
    connection = connect()
    n = 0
    while not os.path.exists(stop):
        n += 1
        table, text = (worker + n) % TABLES, f"von {worker} Nummer {n} ä€😀"
        maybe = None if n % 5 == 0 else n
        while True:
            try:
                cursor = connection.cursor()
                # After a lost connection nobody knows whether the statement was done.
                if not has(cursor, table, worker, n):
                    values = (worker + 1, n, text, maybe)
                    cursor.execute(f"INSERT INTO t{table} (worker, n, txt, maybe) VALUES (%s, %s, %s, %s)", values)
                acknowledged[worker] = n
                found = has(cursor, table, worker, n)
                if found != (text,):
                    wrong.append([worker, n, str(found)])
                break
            except (pymysql.err.Error, OSError):
                errors[worker] += 1
                connection = again(worker)
        time.sleep(0.5)


threads = [threading.Thread(target=work, args=(worker,)) for worker in range(WORKERS)]
for thread in threads:
    thread.start()
print("running", flush=True)
for thread in threads:
    thread.join()
print(json.dumps({"acknowledged": acknowledged, "errors": sum(errors), "wrong": wrong}), flush=True)
