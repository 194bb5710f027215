"""Eight threads and two worker processes that compute until a file is there: python3 threads.py STOP-FILE."""

import hashlib
import multiprocessing
import os
import sys
import threading
import time

STEPS = 200
LOCK = threading.Lock()
ROUNDS = 0


def chain(value):
    for _ in range(STEPS):
        value = hashlib.sha256(value).digest()
    return value


def compute(stop, name, results):
    global ROUNDS
    expected, rounds = chain(name), 0
    while not os.path.exists(stop):
        assert chain(name) == expected, name
        rounds += 1
        with LOCK:
            ROUNDS += 1
        time.sleep(0.3)
    results[name] = rounds


def square(number):
    time.sleep(0.1)
    return number * number


def main(stop):
    results = {}
    with multiprocessing.Pool(2) as pool:
        names = [b"thread %d" % n for n in range(8)]
        threads = [threading.Thread(target=compute, args=(stop, name, results)) for name in names]
        for thread in threads:
            thread.start()
        print("running", flush=True)
        squares = 0
        while not os.path.exists(stop):
            numbers = range(squares, squares + 10)
            assert list(pool.map(square, numbers)) == [n * n for n in numbers]
            squares += 10
        for thread in threads:
            thread.join()
    assert ROUNDS == sum(results.values())
    print("right results", len(results), squares > 0, flush=True)


main(sys.argv[1])
