/* The C ABI: sizes as `context.rs` has them, and every function. Built with sanitizers and run by `cargo xtask libotherworld --check`. */
#include <errno.h>
#include <otherworld.h>
#include <stdio.h>

_Static_assert(sizeof(otherworld_context) == 96, "context");
_Static_assert(sizeof(otherworld_thread) == 248, "thread");
_Static_assert(sizeof(otherworld_descriptor) == 16, "descriptor");
_Static_assert(sizeof(otherworld_loss) == 16, "loss");
_Static_assert(sizeof(otherworld_lock) == 24, "lock");
_Static_assert(sizeof(otherworld_options) == 24, "options");

static int failures;

#define CHECK(what)                                                    \
    do {                                                               \
        if (!(what)) {                                                 \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what); \
            failures++;                                                \
        }                                                              \
    } while (0)

static otherworld_outcome procedure(const otherworld_context *context, void *data)
{
    volatile char stack[200000];

    stack[0] = stack[sizeof stack - 1] = 1;
    CHECK(context->size == sizeof *context);
    CHECK(context->thread_count == 1 && context->loss_count == 0 && context->panic[0]);
    return *(otherworld_outcome *)data;
}

static void *held(void *lock)
{
    return (void *)(intptr_t)otherworld_mutex_owner(lock);
}

int main(void)
{
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static pthread_rwlock_t rwlock = PTHREAD_RWLOCK_INITIALIZER;
    static char region[10000], other[64];
    otherworld_outcome answer = OTHERWORLD_RESTART;
    otherworld_options options = { .stack_size = 1 << 20, .time_limit_ms = 1000 };
    pthread_t thread;
    void *owner;

    CHECK(otherworld_rehearse() == -1);
    CHECK(otherworld_register(NULL, NULL, NULL) == EINVAL);
    options.stack_size = 1ull << 40;
    CHECK(otherworld_register(procedure, &answer, &options) == EINVAL);
    options.stack_size = 1 << 20;
    CHECK(otherworld_register(procedure, &answer, &options) == 0);
    CHECK(otherworld_rehearse() == OTHERWORLD_RESTART);
    answer = (otherworld_outcome)7;
    CHECK(otherworld_rehearse() == -1);
    answer = OTHERWORLD_EXIT;
    CHECK(otherworld_register(procedure, &answer, NULL) == 0);
    CHECK(otherworld_rehearse() == OTHERWORLD_EXIT);

    CHECK(otherworld_protect(region, sizeof region) == 0);
    CHECK(otherworld_protect(region, sizeof region) == 0);
    for (int i = 0; i < 63; i++)
        CHECK(otherworld_protect(other + i, 1) == 0);
    CHECK(otherworld_protect(other + 63, 1) == ENOSPC);
    CHECK(otherworld_unprotect(region) == 0);
    CHECK(otherworld_unprotect(region) == ENOENT);

    CHECK(otherworld_watch_lock(&mutex, OTHERWORLD_LOCK_MUTEX, 1) == 0);
    CHECK(otherworld_watch_lock(&rwlock, 99, 1) == EINVAL);
    CHECK(otherworld_unwatch_lock(&rwlock) == ENOENT);
    CHECK(otherworld_unwatch_lock(&mutex) == 0);

    CHECK(otherworld_mutex_owner(&mutex) == 0);
    pthread_mutex_lock(&mutex);
    CHECK(!pthread_create(&thread, NULL, held, &mutex) && !pthread_join(thread, &owner));
    CHECK((intptr_t)owner > 0 && (intptr_t)owner == otherworld_mutex_owner(&mutex));
    pthread_mutex_unlock(&mutex);
    pthread_rwlock_rdlock(&rwlock);
    CHECK(otherworld_rwlock_owner(&rwlock) == -1);
    pthread_rwlock_unlock(&rwlock);
    CHECK(otherworld_rwlock_owner(&rwlock) == 0);

    otherworld_unregister();
    CHECK(otherworld_rehearse() == -1);
    return failures != 0;
}
