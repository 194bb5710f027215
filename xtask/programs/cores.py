"""The oracle of `cargo xtask cores`: what a process's memory is, through /proc, and whether a core file has the same. Knows nothing of Otherworld.

still PID [TID]            waits until all threads but TID are blocked or stopped
record PID DIR             every page of the process, to DIR/PID.index and DIR/PID.pages
pageout PID ADDR LEN       to the swap area; fails unless all of it is there
compare PID DIR CORE       fails unless CORE has the same bytes
damage PID DIR CORE        changes one byte of memory, and the program counters of all threads, in CORE
"""

import array
import ctypes
import json
import os
import struct
import sys
import time

PAGE = 4096
PRESENT, SWAPPED = 1 << 63, 1 << 62
PT_LOAD, PT_NOTE, NT_PRSTATUS = 1, 4, 1
RIP = 112 + 16 * 8
# Of the kernel's, not of the process.
KERNELS = ("[vvar]", "[vvar_vclock]", "[vsyscall]")


def states(pid, but):
    for tid in os.listdir(f"/proc/{pid}/task"):
        if int(tid) != but:
            with open(f"/proc/{pid}/task/{tid}/stat") as stat:
                yield stat.read().rsplit(")", 1)[1].split()[0]


def still(pid, but=0):
    for _ in range(600):
        if all(state in "STt" for state in states(pid, but)):
            return
        time.sleep(0.1)
    sys.exit(f"{pid} does not become still: {list(states(pid, but))}")


def mappings(pid):
    """Start, end, permissions, offset, inode, name; and how many pages are there."""
    mapping = None
    with open(f"/proc/{pid}/smaps") as smaps:
        for line in smaps:
            words = line.rstrip("\n").split(None, 5)
            if words[0] in ("Rss:", "Swap:"):
                mapping[-1] += int(words[1]) // 4
            elif "-" in words[0]:
                if mapping:
                    yield mapping
                start, end = (int(word, 16) for word in words[0].split("-"))
                name = words[5] if len(words) > 5 else ""
                mapping = [start, end, words[1], int(words[2], 16), int(words[4]), name, 0]
    yield mapping


def entries(pid, start, end):
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(start // PAGE * 8)
        return array.array("Q", pagemap.read((end - start) // PAGE * 8))


def runs(pid, start, end, resident):
    """Which pages are there: (whether, address, how many). Behind the last of those that are there, of which there are so many, nobody looks."""
    STEP = 1 << 16
    run, at, found = None, start, 0
    while at < end and found < resident:
        upto = min(end, at + STEP * PAGE)
        for entry in entries(pid, at, upto):
            there = entry & (PRESENT | SWAPPED) != 0
            found += there
            if run and run[0] == there:
                run[2] += 1
            else:
                if run:
                    yield run
                run = [there, at, 1]
            at += PAGE
    if at < end:
        if run and not run[0]:
            run[2] += (end - at) // PAGE
        else:
            if run:
                yield run
            run = [False, at, (end - at) // PAGE]
    if run:
        yield run


def record(pid, directory):
    """Kinds: memory (has to be there), zero (anonymous, never touched), file (may be there, and then has to be this)."""
    index = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem, open(f"{directory}/{pid}.pages", "wb") as out:
        for start, end, perms, offset, inode, name, resident in mappings(pid):
            if name in KERNELS:
                continue
            otherwise = "zero" if inode == 0 else "file" if perms[3] == "p" and os.path.exists(name) else "unknown"
            parts = [(True, start, (end - start) // PAGE)] if name == "[vdso]" else runs(pid, start, end, resident)
            for there, addr, count in parts:
                data, kind = b"", "memory" if there else otherwise
                if kind == "memory":
                    data = os.pread(mem.fileno(), count * PAGE, addr)
                    assert len(data) == count * PAGE, f"{addr:x}"
                elif kind == "file":
                    with open(name, "rb") as file:
                        data = os.pread(file.fileno(), count * PAGE, offset + addr - start)
                index.append([kind, addr, count, out.tell(), len(data), name])
                out.write(data)
    with open(f"{directory}/{pid}.index", "w") as out:
        json.dump(index, out)
    pages = sum(part[2] for part in index if part[0] == "memory")
    print(pages)


def pageout(pid, addr, length):
    MADV_PAGEOUT, PROCESS_MADVISE = 21, 440
    libc = ctypes.CDLL(None, use_errno=True)
    vector = (ctypes.c_size_t * 2)(addr, length)
    pidfd = os.pidfd_open(pid)
    for _ in range(100):
        if libc.syscall(PROCESS_MADVISE, pidfd, vector, ctypes.c_size_t(1), MADV_PAGEOUT, 0) < 0:
            sys.exit(os.strerror(ctypes.get_errno()))
        if all(entry & SWAPPED for entry in entries(pid, addr, addr + length)):
            return
        time.sleep(0.1)
    sys.exit("not all of it was paged out")


class Core:
    def __init__(self, path, mode="rb"):
        self.file = open(path, mode, buffering=0)
        head = self.read(0, 64)
        assert head[:6] == b"\x7fELF\x02\x01" and struct.unpack_from("<H", head, 16)[0] == 4, "not a core file"
        at, = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        assert count < 0xFFFF
        headers = [struct.unpack("<IIQQQQQQ", self.read(at + n * size, 56)) for n in range(count)]
        self.loads = [(addr, memory, offset, length) for kind, _, offset, addr, _, length, memory, _ in headers if kind == PT_LOAD]
        self.notes = next((offset, length) for kind, _, offset, _, _, length, _, _ in headers if kind == PT_NOTE)

    def read(self, at, length):
        data = os.pread(self.file.fileno(), length, at)
        assert len(data) == length, f"the file ends before {at + length:x}"
        return data

    def parts(self, start, end):
        """Where a range is in the file: (address, length, offset); no offset where it has no contents."""
        at = start
        for addr, memory, offset, length in self.loads:
            low, high = max(at, addr), min(end, addr + memory)
            if low >= high:
                continue
            if low > at:
                yield at, low - at, None
            if length:
                assert length == memory
                yield low, high - low, offset + low - addr
            else:
                yield low, high - low, None
            at = high
        if at < end:
            yield at, end - at, None

    def is_hole(self, offset, length):
        try:
            return os.lseek(self.file.fileno(), offset, os.SEEK_DATA) >= offset + length
        except OSError:
            return True

    def program_counters(self):
        at, length = self.notes
        end = at + length
        while at < end:
            name, desc, kind = struct.unpack("<III", self.read(at, 12))
            data = at + 12 + (name + 3) // 4 * 4
            if kind == NT_PRSTATUS:
                yield data + RIP
            at = data + (desc + 3) // 4 * 4


def compare(pid, directory, path):
    core, wrong, counts = Core(path), [], {}
    with open(f"{directory}/{pid}.index") as file, open(f"{directory}/{pid}.pages", "rb") as pages:
        for kind, addr, count, blob, length, name in json.load(file):
            if kind == "unknown":
                continue
            pages.seek(blob)
            expected = pages.read(length)
            for start, size, offset in core.parts(addr, addr + count * PAGE):
                if offset is None:
                    # Memory without contents reads as nothing, and never as something else.
                    if kind == "memory":
                        wrong.append(f"{start:x}-{start + size:x} {name} is not in the core file")
                    continue
                if kind == "zero" and core.is_hole(offset, size):
                    counts[kind] = counts.get(kind, 0) + size // PAGE
                    continue
                found = core.read(offset, size)
                want = expected[start - addr:start - addr + size].ljust(size, b"\0")
                counts[kind] = counts.get(kind, 0) + size // PAGE
                if found != want:
                    differing = [n for n in range(0, size, PAGE) if found[n:n + PAGE] != want[n:n + PAGE]]
                    wrong.append(f"{len(differing)} pages differ, the first at {start + differing[0]:x} ({kind}, {name})")
    print(json.dumps(counts))
    if wrong:
        sys.exit("\n".join(wrong[:20]))


def damage(pid, directory, path):
    core = Core(path, "r+b")
    with open(f"{directory}/{pid}.index") as file:
        addr = next(addr for kind, addr, *_ in json.load(file) if kind == "memory")
    _, _, offset = next(part for part in core.parts(addr, addr + PAGE))
    places = [(offset + 100, 1)] + [(at, 8) for at in core.program_counters()]
    for at, length in places:
        changed = bytes(byte ^ 0x15 for byte in core.read(at, length))
        os.pwrite(core.file.fileno(), changed, at)


COMMANDS = {"still": still, "record": record, "pageout": pageout, "compare": compare, "damage": damage}
arguments = [int(word, 0) if word[:1].isdigit() else word for word in sys.argv[2:]]
COMMANDS[sys.argv[1]](*arguments)
