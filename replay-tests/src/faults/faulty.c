/*
 * Runs a program whose file operations can be made to fail.
 *
 *     faulty LOG N ERRNO HOW ROOT... -- PROGRAM ARGUMENT...
 *
 * Every call of the program, and of what it starts, that changes something below one of the roots is counted and written to
 * LOG, one line each: its number, its name, the path, and "FAILED" if it was made to fail. The N-th fails with ERRNO
 * (N = 0: none). HOW is "once", "lasting" (it and all that follow: a broken disk) or "full" (it and all that follow, of
 * those that need room). As soon as there is a file LOG.well nothing fails any more.
 *
 * The program asks (seccomp's user notification), a process beside it answers; so the program keeps its process id, its parent
 * and its exit status, and nothing needs more rights than the program has. The answer to a call is "go on" or an
 * error: what goes on is done by the kernel as if nobody had asked.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif

/* Where a call names what it changes. */
enum shape {
    FD,         /* a descriptor comes first */
    FD_THIRD,   /* a descriptor comes third */
    PATH,       /* a path comes first */
    AT,         /* a folder's descriptor, and a path */
    AT_THIRD,   /* the same as third and fourth */
};

struct call {
    int number;
    const char *name;
    enum shape shape;
    int room; /* whether it may need room */
};

static const struct call calls[] = {
    { SYS_fsync, "fsync", FD, 0 }, /* what was written has its room */
    { SYS_fdatasync, "fdatasync", FD, 0 },
    { SYS_sync_file_range, "sync_file_range", FD, 0 },
    { SYS_write, "write", FD, 1 },
    { SYS_writev, "writev", FD, 1 },
    { SYS_pwrite64, "pwrite64", FD, 1 },
    { SYS_pwritev, "pwritev", FD, 1 },
    { SYS_pwritev2, "pwritev2", FD, 1 },
    { SYS_copy_file_range, "copy_file_range", FD_THIRD, 1 },
    { SYS_fallocate, "fallocate", FD, 1 },
    { SYS_ftruncate, "ftruncate", FD, 0 },
    { SYS_fchmod, "fchmod", FD, 0 },
    { SYS_fchown, "fchown", FD, 0 },
    { SYS_openat, "openat", AT, 1 },
    { SYS_openat2, "openat2", AT, 1 },
    { SYS_mkdirat, "mkdirat", AT, 1 },
    { SYS_unlinkat, "unlinkat", AT, 0 },
    { SYS_renameat, "renameat", AT_THIRD, 1 },
    { SYS_renameat2, "renameat2", AT_THIRD, 1 },
    { SYS_linkat, "linkat", AT_THIRD, 1 },
#ifdef SYS_open
    { SYS_open, "open", PATH, 1 },
    { SYS_mkdir, "mkdir", PATH, 1 },
    { SYS_unlink, "unlink", PATH, 0 },
    { SYS_rmdir, "rmdir", PATH, 0 },
    { SYS_rename, "rename", PATH, 1 },
#endif
};
enum { CALLS = sizeof calls / sizeof *calls };

static void die(const char *what)
{
    fprintf(stderr, "faulty: %s: %s\n", what, strerror(errno));
    _exit(99);
}

static int install(void)
{
    struct sock_filter filter[2 * CALLS + 2];
    int n = 0;
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < CALLS; i++) {
        filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[i].number, 0, 1);
        filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF);
    }
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = { (unsigned short)n, filter };
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        die("no new privileges");
    unsigned long flags = SECCOMP_FILTER_FLAG_NEW_LISTENER;
    int fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
                          flags | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, &program);
    if (fd < 0)
        fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    return fd;
}

/* sendmsg is not among the watched calls: before the listener has arrived, nobody answers. */
static void hand_over(int socket, int fd)
{
    char byte = 'x', space[CMSG_SPACE(sizeof fd)] = { 0 };
    struct iovec data = { &byte, 1 };
    struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space };
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(head), &fd, sizeof fd);
    if (sendmsg(socket, &message, 0) != 1)
        die("hand over the listener");
}

static int take_over(int socket)
{
    char byte, space[CMSG_SPACE(sizeof(int))];
    struct iovec data = { &byte, 1 };
    struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space };
    int fd;
    if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != 1 || !CMSG_FIRSTHDR(&message))
        _exit(0); /* The program could not be prepared, and has said so. */
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

static int follow(int pid, const char *what, char *to)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/%d/%s", pid, what);
    ssize_t n = readlink(link, to, PATH_MAX - 1);
    if (n < 0)
        return 0;
    to[n] = 0;
    return 1;
}

static int of_descriptor(int pid, int fd, char *to)
{
    char what[32];
    snprintf(what, sizeof what, "fd/%d", fd);
    return follow(pid, what, to);
}

static int read_text(int pid, unsigned long long at, char *to)
{
    size_t got = 0;
    /* Page by page: the text may end right before one that cannot be read. */
    while (got < PATH_MAX - 1) {
        size_t want = 4096 - ((at + got) & 4095);
        if (want > PATH_MAX - 1 - got)
            want = PATH_MAX - 1 - got;
        struct iovec here = { to + got, want }, there = { (void *)(uintptr_t)(at + got), want };
        ssize_t n = process_vm_readv(pid, &here, 1, &there, 1, 0);
        if (n <= 0)
            return 0;
        if (memchr(to + got, 0, (size_t)n))
            return 1;
        got += (size_t)n;
    }
    return 0;
}

static int of_path(int pid, int folder, unsigned long long at, char *to)
{
    char name[PATH_MAX], base[PATH_MAX];
    if (!read_text(pid, at, name))
        return 0;
    if (name[0] == '/') {
        strcpy(to, name);
        return 1;
    }
    int known = folder == AT_FDCWD ? follow(pid, "cwd", base) : of_descriptor(pid, folder, base);
    if (!known)
        return 0;
    int n = snprintf(to, PATH_MAX, "%s/%s", base, name);
    return n > 0 && n < PATH_MAX;
}

static int locate(const struct call *call, const struct seccomp_notif *asked, char *to)
{
    const __u64 *args = asked->data.args;
    int pid = (int)asked->pid;
    switch (call->shape) {
    case FD: return of_descriptor(pid, (int)args[0], to);
    case FD_THIRD: return of_descriptor(pid, (int)args[2], to);
    case PATH: return of_path(pid, AT_FDCWD, args[0], to);
    case AT: return of_path(pid, (int)args[0], args[1], to);
    case AT_THIRD: return of_path(pid, (int)args[2], args[3], to);
    }
    return 0;
}

/* Whether a call opens something that is there already, and leaves it as it is. */
static int only_opens(const struct call *call, const struct seccomp_notif *asked)
{
    __u64 flags;
    if (call->number == SYS_openat)
        flags = asked->data.args[2];
#ifdef SYS_open
    else if (call->number == SYS_open)
        flags = asked->data.args[1];
#endif
    else if (call->number == SYS_openat2) {
        struct iovec here = { &flags, sizeof flags }, there = { (void *)(uintptr_t)asked->data.args[2], sizeof flags };
        if (process_vm_readv((int)asked->pid, &here, 1, &there, 1, 0) != sizeof flags)
            return 1;
    } else
        return 0;
    return !(flags & (O_CREAT | O_TRUNC));
}

struct wish {
    long nth;
    int error;
    const char *how;
    char **roots;
    int count;
};

static int below(const struct wish *wish, const char *path)
{
    for (int i = 0; i < wish->count; i++) {
        size_t n = strlen(wish->roots[i]);
        if (!strncmp(path, wish->roots[i], n) && (path[n] == '/' || !path[n]))
            return 1;
    }
    return 0;
}

static void answer(int listener, int log, const char *well, const struct wish *wish)
{
    struct seccomp_notif asked;
    long counted = 0;
    for (;;) {
        char path[PATH_MAX], line[PATH_MAX + 64];
        struct pollfd watched = { .fd = listener, .events = POLLIN };
        if (poll(&watched, 1, -1) < 0 && errno != EINTR)
            return;
        if (!(watched.revents & POLLIN)) {
            if (watched.revents & POLLHUP)
                return; /* Nobody is left who could ask. */
            continue;
        }
        memset(&asked, 0, sizeof asked);
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &asked)) {
            if (errno == EINTR || errno == ENOENT)
                continue;
            return;
        }
        struct seccomp_notif_resp reply = { .id = asked.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE };
        for (int i = 0; i < CALLS; i++) {
            const struct call *call = &calls[i];
            if (call->number != asked.data.nr || !locate(call, &asked, path) || !below(wish, path))
                continue;
            if (only_opens(call, &asked))
                break;
            counted++;
            int fails = counted == wish->nth;
            if (wish->nth && counted > wish->nth)
                fails = !strcmp(wish->how, "lasting") || (!strcmp(wish->how, "full") && call->room);
            if (fails && access(well, F_OK) == 0)
                fails = 0;
            if (fails) {
                reply.flags = 0;
                reply.error = -wish->error;
            }
            int n = snprintf(line, sizeof line, "%ld %s %s%s\n", counted, call->name, path, fails ? " FAILED" : "");
            if (write(log, line, (size_t)n) != n)
                return;
            break;
        }
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &reply) && errno != ENOENT)
            return;
    }
}

int main(int count, char **args)
{
    int roots = 5, program = roots;
    while (program < count && strcmp(args[program], "--"))
        program++;
    if (count < 7 || program + 1 >= count) {
        fprintf(stderr, "usage: faulty LOG N ERRNO once|lasting|full ROOT... -- PROGRAM ARGUMENT...\n");
        return 99;
    }
    struct wish wish = { atol(args[2]), atoi(args[3]), args[4], args + roots, program - roots };
    int pair[2], log = open(args[1], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (log < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
        die(args[1]);
    int child = fork();
    if (child < 0)
        die("fork");
    if (!child) {
        /* No child of the program's, out of the way of signals to its group, and of whoever waits for the end of its output. */
        setsid();
        if (fork())
            _exit(0);
        close(pair[0]);
        for (int fd = 0; fd < 3; fd++)
            close(fd);
        char well[PATH_MAX];
        snprintf(well, sizeof well, "%s.well", args[1]);
        answer(take_over(pair[1]), log, well, &wish);
        _exit(0);
    }
    waitpid(child, NULL, 0);
    close(pair[1]);
    /* Where the system lets only ancestors look at a process. */
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
    int listener = install();
    if (listener < 0)
        die("watch the program's calls");
    hand_over(pair[0], listener);
    close(listener);
    execvp(args[program + 1], args + program + 1);
    die(args[program + 1]);
}
