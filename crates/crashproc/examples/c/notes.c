/*
 * Notes: a small program that keeps what it is told in memory, and does not lose it when the kernel dies.
 *
 *   notes continue FILE   the crash procedure writes the notes to FILE, as a copy, and the program goes on where it was
 *   notes restart FILE    the crash procedure writes the notes to FILE, and the program begins anew and reads them
 *   notes rehearse FILE   adds two notes, calls the procedure of `continue` as a test would, and ends
 *
 * Commands on standard input: "add TEXT", "count", "list". docs/crash-procedures.md explains it line by line.
 */
#include <errno.h>
#include <fcntl.h>
#include <otherworld.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct note {
    struct note *next;
    char text[];
};

static struct note *first, **last = &first;
static unsigned long count;
/* Held while the list is changed. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *file;

static int add(const char *text)
{
    struct note *note = malloc(sizeof *note + strlen(text) + 1);

    if (!note)
        return -1;
    note->next = NULL;
    strcpy(note->text, text);
    pthread_mutex_lock(&lock);
    *last = note;
    last = &note->next;
    count++;
    pthread_mutex_unlock(&lock);
    return 0;
}

/* Only system calls: the crash may have interrupted malloc or stdio, whose locks would never be released. */
static int save(void)
{
    char part[4096];
    int fd;

    if (snprintf(part, sizeof part, "%s.part", file) >= (int)sizeof part)
        return -1;
    fd = open(part, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0)
        return -1;
    for (struct note *note = first; note; note = note->next) {
        size_t len = strlen(note->text);

        if (write(fd, note->text, len) != (ssize_t)len || write(fd, "\n", 1) != 1) {
            close(fd);
            return -1;
        }
    }
    /* A file is either whole or not there. */
    if (fsync(fd) || close(fd) || rename(part, file))
        return -1;
    return 0;
}

static otherworld_outcome when_the_kernel_dies(const otherworld_context *context, void *restart)
{
    (void)context;
    /* Amid a change of the list: let it be finished, and go on. Nothing has been lost. */
    if (otherworld_mutex_owner(&lock))
        return OTHERWORLD_CONTINUE;
    if (save())
        return OTHERWORLD_CONTINUE;
    return restart ? OTHERWORLD_RESTART : OTHERWORLD_CONTINUE;
}

static void load(void)
{
    char line[4096];
    FILE *stream = fopen(file, "r");

    if (!stream)
        return;
    while (fgets(line, sizeof line, stream)) {
        line[strcspn(line, "\n")] = 0;
        add(line);
    }
    fclose(stream);
}

int main(int argc, char **argv)
{
    char line[4096];
    int restart, rehearse;

    if (argc != 3 || !(restart = !strcmp(argv[1], "restart"), rehearse = !strcmp(argv[1], "rehearse"),
                       restart || rehearse || !strcmp(argv[1], "continue"))) {
        fprintf(stderr, "usage: notes continue|restart|rehearse FILE\n");
        return 2;
    }
    file = argv[2];
    if (restart)
        load();
    errno = otherworld_register(when_the_kernel_dies, restart ? &count : NULL, NULL);
    if (!errno)
        errno = otherworld_watch_lock(&lock, OTHERWORLD_LOCK_MUTEX, 1);
    if (errno) {
        perror("notes: registering a crash procedure");
        return 1;
    }
    if (rehearse) {
        add("milk");
        add("bread");
        return otherworld_rehearse() == OTHERWORLD_CONTINUE ? 0 : 1;
    }
    setvbuf(stdin, NULL, _IONBF, 0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, "add ", 4))
            puts(add(line + 4) ? "no memory" : "added");
        else if (!strcmp(line, "count"))
            printf("%lu\n", count);
        else if (!strcmp(line, "list"))
            for (struct note *note = first; note; note = note->next)
                puts(note->text);
        else
            puts("what?");
    }
    return 0;
}
