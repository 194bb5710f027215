# Extends a SHA-256 chain in memory and appends each 1000th link to a file.
import hashlib
import sys

links, out = int(sys.argv[1]), sys.argv[2]
link = b"otherworld"
with open(out, "a") as file:
    for n in range(1, links + 1):
        link = hashlib.sha256(link).digest()
        if n % 1000 == 0:
            file.write(f"{n} {link.hex()}\n")
            file.flush()
    file.write(f"end {link.hex()}\n")
