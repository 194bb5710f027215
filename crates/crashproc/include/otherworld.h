/*
 * libotherworld: an application's say in its own resurrection.
 *
 * Register a crash procedure once. Should the kernel die, the crash kernel calls it in the resurrected process, on a stack of its own, before any
 * thread goes on; what it returns decides how the process goes on. Until then it costs one mapping of 8 KiB: no system call, no signal, no thread.
 * In a program that is never resurrected nothing happens at all.
 *
 * All functions are thread-safe. Those that return int return 0, or an errno value. Tutorial and reference: docs/crash-procedures.md.
 */
#ifndef OTHERWORLD_H
#define OTHERWORLD_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How the process goes on. */
typedef enum {
    OTHERWORLD_CONTINUE = 0, /* every thread where it was */
    OTHERWORLD_RESTART = 1,  /* the same program anew, with its arguments and its environment (for others: call execve) */
    OTHERWORLD_EXIT = 2      /* it ends, with exit code 0 (for another: call _exit) */
} otherworld_outcome;

typedef enum {
    OTHERWORLD_SYSCALL_NONE = 0,   /* there was none */
    OTHERWORLD_SYSCALL_AGAIN = 1,  /* it is issued again */
    OTHERWORLD_SYSCALL_RETURNS = 2 /* it returns syscall_result */
} otherworld_syscall_outcome;

/* A thread, as it was interrupted. */
typedef struct {
    int32_t tid;
    uint32_t on_cpu;     /* it was computing */
    int64_t syscall;     /* the call that it was in, or -1 */
    uint32_t syscall_outcome;
    uint32_t reserved;
    int64_t syscall_result;
    uint64_t registers[27]; /* struct user_regs_struct */
} otherworld_thread;

typedef enum {
    OTHERWORLD_DESCRIPTOR_BACK = 0,
    OTHERWORLD_DESCRIPTOR_CHANGED = 1, /* back, and something is different: see why */
    OTHERWORLD_DESCRIPTOR_DEAD = 2     /* errors and the end of the file from now on */
} otherworld_descriptor_state;

typedef struct {
    int32_t fd;
    uint32_t state;
    const char *why; /* NULL when it is back as it was */
} otherworld_descriptor;

/* Something that is not as it was. */
typedef struct {
    const char *code; /* for programs, as in the report */
    const char *text; /* for people */
} otherworld_loss;

/* A watched lock, as it was when the kernel died. */
typedef struct {
    const void *address;
    uint32_t kind;     /* OTHERWORLD_LOCK_... */
    uint32_t tag;      /* the application's */
    int32_t owner;     /* 0 nobody, a thread id, or minus the number of readers */
    uint32_t known;    /* 0: it could not be read */
} otherworld_lock;

/* What had happened. Valid until the procedure returns. Later versions append: `size` says what there is. */
typedef struct {
    uint32_t size;       /* of this structure */
    uint32_t generation; /* how many kernels have died since the machine was switched on */
    const char *panic;   /* why this one did */
    const otherworld_thread *threads;
    uint64_t thread_count;
    const otherworld_descriptor *descriptors;
    uint64_t descriptor_count;
    const otherworld_loss *losses;
    uint64_t loss_count;
    const uint64_t *damaged_regions; /* addresses of protected regions whose contents have changed */
    uint64_t damaged_region_count;
    const otherworld_lock *locks;
    uint64_t lock_count;
} otherworld_context;

typedef otherworld_outcome (*otherworld_procedure)(const otherworld_context *context, void *data);

#define OTHERWORLD_THREADS_RUN 1u /* the other threads go on before the procedure is called, not after it has returned */

typedef struct {
    uint64_t stack_size;    /* bytes, at most 64 MiB; 0: 256 KiB */
    uint64_t time_limit_ms; /* at most ten minutes; 0: 20 seconds */
    uint32_t flags;         /* OTHERWORLD_THREADS_RUN */
    uint32_t reserved;      /* 0 */
} otherworld_options;

/* Registers the procedure, in the place of a former one. `options` may be NULL. ENOMEM, EINVAL. */
int otherworld_register(otherworld_procedure procedure, void *data, const otherworld_options *options);
void otherworld_unregister(void);

/* Has the contents of this memory checked before the procedure runs. Call it again after each change: it reads all of it. ENOSPC: there are 64. */
int otherworld_protect(const void *start, size_t len);
int otherworld_unprotect(const void *start); /* ENOENT */

enum {
    OTHERWORLD_LOCK_MUTEX = 1,  /* pthread_mutex_t */
    OTHERWORLD_LOCK_RWLOCK = 2, /* pthread_rwlock_t */
    OTHERWORLD_LOCK_WORD = 3    /* uint32_t: 0 when it is free, the owner's thread id otherwise */
};

/* Makes a lock known: the context and the report name those that were held. ENOSPC: there are 96. EINVAL: no such kind. */
int otherworld_watch_lock(const void *lock, uint32_t kind, uint32_t tag);
int otherworld_unwatch_lock(const void *lock); /* ENOENT */

/* Who holds a lock: 0 nobody, a thread id, or minus the number of readers. For procedures, while the other threads stand still. */
int otherworld_mutex_owner(const pthread_mutex_t *mutex);
int otherworld_rwlock_owner(const pthread_rwlock_t *lock);

/* Calls the registered procedure here and now, in a thread with a stack of the size that it asked for and with a context that has the calling thread
   and no losses, and returns its answer without acting on it: for the application's own tests. -1: there is none, or no memory for it. */
int otherworld_rehearse(void);

#ifdef __cplusplus
}
#endif

#endif
