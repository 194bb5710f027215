# Makes the deterministic, compressible input of xz: text-like lines out of a small vocabulary, in long repeats.
import random
import sys

size, out = int(sys.argv[1]), sys.argv[2]
draw = random.Random(2)
words = [bytes(draw.choices(b"abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(600)]
pages = [b" ".join(draw.choices(words, k=600)) + b"\n" for _ in range(64)]
with open(out, "wb") as file:
    written = 0
    while written < size:
        page = draw.choice(pages)
        written += file.write(page[draw.randint(0, 400):])
