/* A disk and a clock with faults, for one directory: loaded by LD_PRELOAD, it stands before the C library's calls.

   Nothing happens until `arm` is called. From then on each call that changes something in the directory is logged,
   and the disk is full from the first call on that is named: the first half of a write still gets through, as on a
   real disk, and after it whatever takes room fails. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char watched[PATH_MAX], *named = "";
static int log_to = -1, full;
static long seconds_back;
static atomic_long readings;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* As on a file system without hard links; in the kernel, since some libraries don't go through the C library here. */
static void forbid_links(void) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
#ifdef __NR_link
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_link, 1, 0),
#endif
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_linkat, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) abort();
}

/* `calls` has a line for each that there is no room for: its kind, a tab, a pattern of its place. */
void arm(const char *directory, const char *log, const char *calls, int links, long back) {
    named = strdup(calls);
    seconds_back = back;
    if (!links) forbid_links();
    log_to = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    snprintf(watched, sizeof watched, "%s", directory);
}

/* A path's place in the directory, written to `place`; no when it lies elsewhere. */
static int is_within(int at, const char *path, char *place) {
    char whole[2 * PATH_MAX] = "", parent[PATH_MAX], link[64];
    size_t length = strlen(watched);
    if (!*watched) return 0;
    if (*path != '/') {
        snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
        ssize_t found = readlink(link, whole, PATH_MAX - 1);
        if (found < 0) return 0;
        whole[found] = '/';
    }
    strncat(whole, path, PATH_MAX - 1);
    char *name = strrchr(whole, '/');
    *name++ = 0;
    if (!realpath(*whole ? whole : "/", parent)) return 0;
    if (!strcmp(parent, "/")) *parent = 0;
    int written = snprintf(place, PATH_MAX, "%s/%s", parent, name);
    if (written >= PATH_MAX || strncmp(place, watched, length) || (place[length] && place[length] != '/')) return 0;
    if (place[length]) memmove(place, place + length + 1, written - length);
    else strcpy(place, ".");
    return 1;
}

static int is_open_within(int file, char *place) {
    char link[64], path[PATH_MAX];
    if (!*watched || file == log_to) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0 || *path != '/') return 0;
    path[length] = 0;
    return is_within(AT_FDCWD, path, place);
}

static void put_down(const char *kind, const char *place, const char *other) {
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", kind, place, other);
    if (REAL(write)(log_to, line, length) < 0) abort();
}

static int is_named(const char *kind, const char *place) {
    char pattern[PATH_MAX];
    for (const char *line = named, *end; (end = strchr(line, '\n')); line = end + 1) {
        size_t length = strlen(kind);
        if (strncmp(line, kind, length) || line[length] != '\t') continue;
        snprintf(pattern, sizeof pattern, "%.*s", (int)(end - line - length - 1), line + length + 1);
        if (!fnmatch(pattern, place, 0)) return 1;
    }
    return 0;
}

/* Logs a call. 0: let it through; 1: it fails, for want of room; 2: it is the first that does. */
static int refuse(const char *kind, const char *place, const char *other) {
    static const char *taking_room[] = {"write", "create", "mkdir", "symlink"};
    if (!full && is_named(kind, place)) {
        full = 1;
        put_down("full", kind, place);
        errno = ENOSPC;
        return 2;
    }
    for (int i = 0; full && i < 4; i++) {
        if (!strcmp(kind, taking_room[i])) {
            errno = ENOSPC;
            return 1;
        }
    }
    put_down(kind, place, other);
    return 0;
}

static int refuse_path(const char *kind, int at, const char *path) {
    char place[PATH_MAX];
    return is_within(at, path, place) && refuse(kind, place, "");
}

static int refuse_file(const char *kind, int file) {
    char place[PATH_MAX];
    return is_open_within(file, place) ? refuse(kind, place, "") : 0;
}

static int refuse_open(int at, const char *path, int flags) {
    if (!(flags & (O_CREAT | O_TRUNC))) return 0;
    int is_there = !faccessat(at, path, F_OK, AT_EACCESS);
    if (is_there) return flags & O_TRUNC ? refuse_path("truncate", at, path) : 0;
    return flags & O_CREAT ? refuse_path("create", at, path) : 0;
}

#define OPENS(name, parameters, at, call)                       \
    int name parameters {                                       \
        va_list rest;                                           \
        va_start(rest, flags);                                  \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                           \
        if (refuse_open(at, path, flags)) return -1;            \
        return REAL(name) call;                                 \
    }
OPENS(open, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPENS(open64, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPENS(openat, (int at, const char *path, int flags, ...), at, (at, path, flags, mode))
OPENS(openat64, (int at, const char *path, int flags, ...), at, (at, path, flags, mode))

#define FOPENS(name)                                            \
    FILE *name(const char *path, const char *mode) {            \
        int flags = *mode == 'w' ? O_CREAT | O_TRUNC : *mode == 'a' ? O_CREAT : 0; \
        return refuse_open(AT_FDCWD, path, flags) ? NULL : REAL(name)(path, mode); \
    }
FOPENS(fopen)
FOPENS(fopen64)

#define WRITES(name, result, parameters, file, count, call, half) \
    result name parameters {                                    \
        int refused = refuse_file("write", file);               \
        if (refused == 2 && (count) > 1) return REAL(name) half; \
        return refused ? -1 : REAL(name) call;                  \
    }
WRITES(write, ssize_t, (int file, const void *from, size_t count), file, count, (file, from, count), (file, from, count / 2))
WRITES(pwrite, ssize_t, (int file, const void *from, size_t count, off_t at), file, count, (file, from, count, at),
       (file, from, count / 2, at))
WRITES(pwrite64, ssize_t, (int file, const void *from, size_t count, off64_t at), file, count, (file, from, count, at),
       (file, from, count / 2, at))
WRITES(writev, ssize_t, (int file, const struct iovec *from, int count), file, count, (file, from, count),
       (file, from, count / 2))
WRITES(sendfile, ssize_t, (int file, int from, off_t *at, size_t count), file, count, (file, from, at, count),
       (file, from, at, 1))
WRITES(sendfile64, ssize_t, (int file, int from, off64_t *at, size_t count), file, count, (file, from, at, count),
       (file, from, at, 1))
WRITES(copy_file_range, ssize_t, (int from, off64_t *a, int file, off64_t *b, size_t count, unsigned flags), file, count,
       (from, a, file, b, count, flags), (from, a, file, b, 1, flags))

int fsync(int file) { return refuse_file("fsync", file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return refuse_file("fsync", file) ? -1 : REAL(fdatasync)(file); }
int ftruncate(int file, off_t to) { return refuse_file("truncate", file) ? -1 : REAL(ftruncate)(file, to); }
int ftruncate64(int file, off64_t to) { return refuse_file("truncate", file) ? -1 : REAL(ftruncate64)(file, to); }

static int refuse_rename(int from, const char *old, int to, const char *new) {
    char place[PATH_MAX], other[PATH_MAX];
    return is_within(from, old, place) && is_within(to, new, other) && refuse("rename", place, other);
}
int rename(const char *old, const char *new) {
    return refuse_rename(AT_FDCWD, old, AT_FDCWD, new) ? -1 : REAL(rename)(old, new);
}
int renameat(int from, const char *old, int to, const char *new) {
    return refuse_rename(from, old, to, new) ? -1 : REAL(renameat)(from, old, to, new);
}

static int refuse_mkdir(int at, const char *path) {
    return faccessat(at, path, F_OK, AT_EACCESS) && refuse_path("mkdir", at, path);
}
int mkdir(const char *path, mode_t mode) { return refuse_mkdir(AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { return refuse_mkdir(at, path) ? -1 : REAL(mkdirat)(at, path, mode); }
int symlink(const char *target, const char *path) {
    return refuse_path("symlink", AT_FDCWD, path) ? -1 : REAL(symlink)(target, path);
}
int symlinkat(const char *target, int at, const char *path) {
    return refuse_path("symlink", at, path) ? -1 : REAL(symlinkat)(target, at, path);
}
int unlink(const char *path) { return refuse_path("unlink", AT_FDCWD, path) ? -1 : REAL(unlink)(path); }
int unlinkat(int at, const char *path, int flags) {
    return refuse_path("unlink", at, path) ? -1 : REAL(unlinkat)(at, path, flags);
}

/* The time of day goes back at each reading. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = REAL(clock_gettime)(clock, now);
    if (!failed && clock == CLOCK_REALTIME && seconds_back) now->tv_sec -= seconds_back * ++readings;
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = REAL(gettimeofday)(now, zone);
    if (!failed && seconds_back) now->tv_sec -= seconds_back * ++readings;
    return failed;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
