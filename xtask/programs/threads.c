/* Threads that wait in known places, and memory of every kind, for `cargo xtask cores`. Says on standard output who is who: "thread NAME TID",
 * "swap ADDRESS LENGTH", "file ADDRESS" (a page that no page cache has), and "ready". */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define DO(what) ((void)((long)(what) != -1 || (perror(#what), exit(1), 0)))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_barrier_t started;
static int pipe_ends[2];

static void started_as(const char *name)
{
	printf("thread %s %d\n", name, (int)syscall(SYS_gettid));
	pthread_barrier_wait(&started);
}

static __attribute__((noinline)) int wait_for_lock(int depth)
{
	if (depth > 0)
		return wait_for_lock(depth - 1) + 1;
	pthread_mutex_lock(&lock);
	return 0;
}

static void *locker(void *unused)
{
	started_as("locker");
	return (void *)(long)(wait_for_lock(3) + (unused != NULL));
}

static __attribute__((noinline)) long read_pipe(void)
{
	char byte;
	return read(pipe_ends[0], &byte, 1) + 1;
}

static void *reader(void *unused)
{
	started_as("reader");
	return (void *)(read_pipe() + (unused != NULL));
}

static __attribute__((noinline)) int sleep_long(void)
{
	struct timespec time = { 50000, 0 };
	return nanosleep(&time, NULL) + 1;
}

static void *sleeper(void *unused)
{
	started_as("sleeper");
	return (void *)(long)(sleep_long() + (unused != NULL));
}

/* Known values in general and vector registers, in pause(2). */
static __attribute__((noinline)) long pause_with_registers(const uint64_t *values)
{
	long result;
	__asm__ volatile("vmovdqu (%1), %%ymm6\n\t"
			 "vmovdqu 32(%1), %%ymm15\n\t"
			 "movq (%1), %%r12\n\t"
			 "movq 8(%1), %%r13\n\t"
			 "syscall"
			 : "=a"(result)
			 : "r"(values), "a"((long)SYS_pause)
			 : "rcx", "r11", "r12", "r13", "xmm6", "xmm15", "memory");
	return result;
}

static void *registers(void *unused)
{
	static const uint64_t values[8] = { 0x1111222233334444, 0x5555666677778888, 0x99990000aaaabbbb, 0xccccddddeeeeffff,
					    0x0123456789abcdef, 0xfedcba9876543210, 0x00ff00ff00ff00ff, 0x1 };
	started_as("registers");
	return (void *)(pause_with_registers(values) + (unused != NULL));
}

static __attribute__((noinline)) void spin(void)
{
	for (;;)
		__asm__ volatile("pause");
}

static void *spinner(void *unused)
{
	cpu_set_t cpus;
	CPU_ZERO(&cpus);
	CPU_SET(1, &cpus);
	DO(sched_setaffinity(0, sizeof cpus, &cpus));
	started_as("spinner");
	spin();
	return unused;
}

static void *fill(void *at, size_t pages, uint64_t seed)
{
	uint64_t *word = at;
	for (size_t n = 0; n < pages * PAGE / sizeof *word; n++)
		word[n] = (seed << 32) + n * 0x9e3779b1;
	return at;
}

static void *map(size_t pages, int flags, int fd)
{
	void *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
	DO((long)at);
	return at;
}

/* A file of as many pages, on the disk and no longer in the page cache. */
static int file(const char *name, size_t pages)
{
	int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
	DO(fd);
	void *bytes = fill(malloc(pages * PAGE), pages, pages);
	DO(write(fd, bytes, pages * PAGE));
	free(bytes);
	DO(fsync(fd));
	DO(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED));
	return fd;
}

static void memory(void)
{
	/* With holes, and with one that is big. */
	char *holes = map(64, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	fill(holes + 3 * PAGE, 2, 1);
	fill(holes + 40 * PAGE, 1, 2);
	char *big = map(16384, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	DO(madvise(big, 16384 * PAGE, MADV_NOHUGEPAGE));
	fill(big + 16383 * PAGE, 1, 3);
	/* A huge page, where it can be one. */
	char *huge = map(1536, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	DO(madvise(huge, 1536 * PAGE, MADV_HUGEPAGE));
	fill(huge, 1536, 4);
	/* Not to be read. */
	char *secret = fill(map(2, MAP_PRIVATE | MAP_ANONYMOUS, -1), 2, 5);
	DO(mprotect(secret, 2 * PAGE, PROT_NONE));
	/* Shared. */
	fill(map(16, MAP_SHARED | MAP_ANONYMOUS, -1), 16, 6);
	int memfd = memfd_create("cores", 0);
	DO(ftruncate(memfd, 8 * PAGE));
	fill(map(8, MAP_SHARED, memfd), 3, 7);
	/* Of a file: read, written to in private, and not there; shared and dirty; deleted. */
	char *private = map(16, MAP_PRIVATE, file("private", 16));
	DO(madvise(private, 16 * PAGE, MADV_RANDOM));
	fill(private + 3 * PAGE, 1, 8);
	volatile char read = private[5 * PAGE];
	(void)read;
	printf("file %p\n", (void *)(private + 9 * PAGE));
	fill(map(16, MAP_SHARED, file("shared", 16)), 2, 9);
	int deleted = file("deleted", 4);
	volatile char *gone = map(4, MAP_PRIVATE, deleted);
	for (int n = 0; n < 4; n++)
		read = gone[n * PAGE];
	DO(unlink("deleted"));
	/* To be paged out. */
	void *swap = map(256, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	DO(madvise(swap, 256 * PAGE, MADV_NOHUGEPAGE));
	fill(swap, 256, 10);
	printf("swap %p %lu\n", swap, 256 * PAGE);
}

static __attribute__((noinline)) int wait_for_all(pthread_t *threads, int count)
{
	for (int n = 0; n < count; n++)
		pthread_join(threads[n], NULL);
	return count;
}

int main(void)
{
	void *(*all[])(void *) = { locker, reader, sleeper, registers, spinner };
	const int count = sizeof all / sizeof *all;
	pthread_t threads[8];
	setvbuf(stdout, NULL, _IOLBF, 0);
	DO(pipe(pipe_ends));
	memory();
	pthread_mutex_lock(&lock);
	pthread_barrier_init(&started, NULL, count + 1);
	for (int n = 0; n < count; n++)
		pthread_create(&threads[n], NULL, all[n], NULL);
	printf("thread main %d\n", (int)getpid());
	pthread_barrier_wait(&started);
	printf("ready\n");
	return wait_for_all(threads, count) == count;
}
