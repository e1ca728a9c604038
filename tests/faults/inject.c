/* Counts the file system calls below one directory, and breaks the one that it is told to. For LD_PRELOAD.

   It stands before the C library: whoever calls that, from Python, Rust or through ctypes and syscall(), passes here.
   What it is told and what it saw lie in memory that the process shares with the one that watches it, so that they
   outlive a kill. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* In the order of CALLS in inject.py. */
enum call {
    STAT, OPEN, CREATE, CLOSE, READ, WRITE, TRUNCATE, SYNC, FLUSH, RENAME, UNLINK, RMDIR, MKDIR, LINK, LOCK, COPY, MAP,
    ATTRIBUTES, SPACE, LIST, READLINK
};

/* In the order of Action in inject.py. */
enum action { PASS, KILL_BEFORE, KILL_AFTER, FAIL, SHORT };

enum { SHOWN = 200, KEPT = 4096 };

struct record {
    int call;
    int failed; /* errno */
    long size;  /* bytes read, written or copied */
    char path[SHOWN];
    char to[SHOWN]; /* of a rename or a link */
};

struct control {
    long at; /* the number of the call that is broken, from 0; -1 for none */
    int action;
    int error;       /* errno of FAIL */
    long then;       /* bit set of the calls that fail after that one */
    int then_error;  /* and how */
    int no_exchange; /* the file system cannot swap two names: renameat2 with a flag fails, uncounted */
    atomic_long count;
    long pid; /* only calls of this process count: its forks do not */
    char prefix[SHOWN];
    struct record log[KEPT];
};

static struct control *control;

void faults_arm(struct control *shared) {
    shared->pid = getpid();
    control = shared;
}

void faults_disarm(void) { control = NULL; }

#define REAL(name) \
    static __typeof__(&name) real; \
    if (real == NULL) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* --- where a call goes --- */

static void of_fd(int fd, char *into) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long n = syscall(SYS_readlinkat, AT_FDCWD, link, into, PATH_MAX - 1);
    into[n > 0 ? n : 0] = 0;
}

static void of_path(int directory, const char *path, char *into) {
    char base[PATH_MAX];
    if (path == NULL || path[0] == 0) {
        into[0] = 0;
        if (path != NULL && directory >= 0) of_fd(directory, into);
        return;
    }
    if (path[0] == '/') {
        snprintf(into, PATH_MAX, "%s", path);
        return;
    }
    if (directory == AT_FDCWD) {
        long n = syscall(SYS_getcwd, base, sizeof base);
        if (n <= 0) base[0] = 0;
    } else {
        of_fd(directory, base);
    }
    size_t n = strlen(base);
    snprintf(into, PATH_MAX, "%s", base);
    snprintf(into + n, PATH_MAX - n, "/%s", path);
}

static int below(const char *path) {
    size_t n = strlen(control->prefix);
    return strncmp(path, control->prefix, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static void shown(const char *path, char *into) {
    const char *tail = below(path) ? path + strlen(control->prefix) : path;
    while (*tail == '/') tail++;
    snprintf(into, SHOWN, "%s", *tail ? tail : ".");
}

/* --- one call --- */

struct entry {
    struct record *record; /* NULL: not counted */
    enum action action;
};

static void die(void) {
    for (;;) syscall(SYS_kill, getpid(), SIGKILL);
}

static struct entry enter(enum call call, const char *path, const char *to) {
    struct entry entry = {NULL, PASS};
    struct control *c = control;
    if (c == NULL || c->pid != getpid() || !(below(path) || (to != NULL && below(to)))) return entry;
    long n = atomic_fetch_add(&c->count, 1);
    static struct record spare;
    entry.record = n < KEPT ? &c->log[n] : &spare;
    entry.record->call = call;
    entry.record->failed = 0;
    entry.record->size = 0;
    entry.record->to[0] = 0;
    shown(path, entry.record->path);
    if (to != NULL) shown(to, entry.record->to);
    if (n == c->at) {
        if (c->action == KILL_BEFORE) die();
        entry.action = c->action;
        errno = c->error;
    } else if (n > c->at && c->at >= 0 && (c->then >> call & 1)) {
        entry.action = FAIL;
        errno = c->then_error;
    }
    if (entry.action == FAIL) entry.record->failed = errno;
    return entry;
}

static long leave(struct entry entry, long result) {
    if (entry.record == NULL) return result;
    int error = errno;
    if (result < 0) entry.record->failed = error;
    else entry.record->size = result;
    if (entry.action == KILL_AFTER) die();
    errno = error;
    return result;
}

static size_t part(struct entry entry, size_t n) { return entry.action == SHORT && n > 1 ? n / 2 : n; }

#define ON_PATH(call, directory, path) \
    char where[PATH_MAX]; \
    where[0] = 0; \
    if (control != NULL) of_path(directory, path, where); \
    struct entry entry = control != NULL ? enter(call, where, NULL) : (struct entry){NULL, PASS}; \
    if (entry.action == FAIL) return -1

#define ON_FD(call, fd) \
    char where[PATH_MAX]; \
    where[0] = 0; \
    if (control != NULL) of_fd(fd, where); \
    struct entry entry = control != NULL ? enter(call, where, NULL) : (struct entry){NULL, PASS}; \
    if (entry.action == FAIL) return -1

#define ON_TWO(call, from_directory, from, to_directory, to) \
    char where[PATH_MAX], other[PATH_MAX]; \
    where[0] = other[0] = 0; \
    if (control != NULL) { \
        of_path(from_directory, from, where); \
        of_path(to_directory, to, other); \
    } \
    struct entry entry = control != NULL ? enter(call, where, other) : (struct entry){NULL, PASS}; \
    if (entry.action == FAIL) return -1

#define SIMPLE(type, name, declared, given, on) \
    type name declared { \
        REAL(name); \
        on; \
        return (type)leave(entry, real given); \
    }

/* --- opening and closing --- */

#define MODE(flags) \
    mode_t mode = 0; \
    if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }
#define KIND(flags) ((flags) & (O_CREAT | O_TRUNC) ? CREATE : OPEN)

int open(const char *path, int flags, ...) {
    REAL(open);
    MODE(flags);
    ON_PATH(KIND(flags), AT_FDCWD, path);
    return leave(entry, real(path, flags, mode));
}
int open64(const char *path, int flags, ...) {
    REAL(open64);
    MODE(flags);
    ON_PATH(KIND(flags), AT_FDCWD, path);
    return leave(entry, real(path, flags, mode));
}
int openat(int directory, const char *path, int flags, ...) {
    REAL(openat);
    MODE(flags);
    ON_PATH(KIND(flags), directory, path);
    return leave(entry, real(directory, path, flags, mode));
}
int openat64(int directory, const char *path, int flags, ...) {
    REAL(openat64);
    MODE(flags);
    ON_PATH(KIND(flags), directory, path);
    return leave(entry, real(directory, path, flags, mode));
}
SIMPLE(int, creat, (const char *path, mode_t mode), (path, mode), ON_PATH(CREATE, AT_FDCWD, path))
SIMPLE(int, creat64, (const char *path, mode_t mode), (path, mode), ON_PATH(CREATE, AT_FDCWD, path))

FILE *fopen(const char *path, const char *how) {
    REAL(fopen);
    char where[PATH_MAX];
    if (control == NULL) return real(path, how);
    of_path(AT_FDCWD, path, where);
    struct entry entry = enter(how[0] == 'r' ? OPEN : CREATE, where, NULL);
    FILE *file = entry.action == FAIL ? NULL : real(path, how);
    leave(entry, file == NULL ? -1 : 0);
    return file;
}
FILE *fopen64(const char *path, const char *how) { return fopen(path, how); }

/* A descriptor that is only read is closed without a word of the disk. */
int close(int fd) {
    REAL(close);
    if (control == NULL || (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY) return real(fd);
    char where[PATH_MAX];
    of_fd(fd, where);
    struct entry entry = enter(CLOSE, where, NULL);
    int error = errno;
    int result = real(fd); /* closed in any case, as on Linux */
    if (entry.action != FAIL) return leave(entry, result);
    errno = error;
    return -1;
}

/* --- bytes --- */

SIMPLE(ssize_t, read, (int fd, void *data, size_t n), (fd, data, part(entry, n)), ON_FD(READ, fd))
SIMPLE(ssize_t, pread, (int fd, void *data, size_t n, off_t at), (fd, data, part(entry, n), at), ON_FD(READ, fd))
SIMPLE(ssize_t, pread64, (int fd, void *data, size_t n, off64_t at), (fd, data, part(entry, n), at), ON_FD(READ, fd))
SIMPLE(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, part(entry, n)), ON_FD(WRITE, fd))
SIMPLE(ssize_t, pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, part(entry, n), at),
       ON_FD(WRITE, fd))
SIMPLE(ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, part(entry, n), at),
       ON_FD(WRITE, fd))

/* A short one of several buffers is one of the first alone, or of half of it. */
#define VECTOR(name, call, declared, given) \
    ssize_t name declared { \
        REAL(name); \
        ON_FD(call, fd); \
        struct iovec first = count > 0 ? parts[0] : (struct iovec){NULL, 0}; \
        if (entry.action == SHORT && count > 0) { \
            if (count == 1) first.iov_len = part(entry, first.iov_len); \
            parts = &first; \
            count = 1; \
        } \
        return leave(entry, real given); \
    }
VECTOR(readv, READ, (int fd, const struct iovec *parts, int count), (fd, parts, count))
VECTOR(writev, WRITE, (int fd, const struct iovec *parts, int count), (fd, parts, count))
VECTOR(preadv, READ, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
VECTOR(preadv64, READ, (int fd, const struct iovec *parts, int count, off64_t at), (fd, parts, count, at))
VECTOR(pwritev, WRITE, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
VECTOR(pwritev64, WRITE, (int fd, const struct iovec *parts, int count, off64_t at), (fd, parts, count, at))
VECTOR(preadv2, READ, (int fd, const struct iovec *parts, int count, off_t at, int flags), (fd, parts, count, at, flags))
VECTOR(preadv64v2, READ, (int fd, const struct iovec *parts, int count, off64_t at, int flags),
       (fd, parts, count, at, flags))
VECTOR(pwritev2, WRITE, (int fd, const struct iovec *parts, int count, off_t at, int flags),
       (fd, parts, count, at, flags))
VECTOR(pwritev64v2, WRITE, (int fd, const struct iovec *parts, int count, off64_t at, int flags),
       (fd, parts, count, at, flags))

#define ON_COPY(from, to) \
    char source[PATH_MAX], where[PATH_MAX]; \
    source[0] = where[0] = 0; \
    if (control != NULL) { \
        of_fd(from, source); \
        of_fd(to, where); \
    } \
    struct entry entry = control != NULL ? enter(COPY, source, where) : (struct entry){NULL, PASS}; \
    if (entry.action == FAIL) return -1
SIMPLE(ssize_t, sendfile, (int to, int from, off_t *at, size_t n), (to, from, at, part(entry, n)), ON_COPY(from, to))
SIMPLE(ssize_t, sendfile64, (int to, int from, off64_t *at, size_t n), (to, from, at, part(entry, n)),
       ON_COPY(from, to))
SIMPLE(ssize_t, copy_file_range, (int from, off64_t *i, int to, off64_t *o, size_t n, unsigned flags),
       (from, i, to, o, part(entry, n), flags), ON_COPY(from, to))

SIMPLE(int, ftruncate, (int fd, off_t size), (fd, size), ON_FD(TRUNCATE, fd))
SIMPLE(int, ftruncate64, (int fd, off64_t size), (fd, size), ON_FD(TRUNCATE, fd))
SIMPLE(int, truncate, (const char *path, off_t size), (path, size), ON_PATH(TRUNCATE, AT_FDCWD, path))
SIMPLE(int, truncate64, (const char *path, off64_t size), (path, size), ON_PATH(TRUNCATE, AT_FDCWD, path))
SIMPLE(int, fallocate, (int fd, int mode, off_t at, off_t n), (fd, mode, at, n), ON_FD(TRUNCATE, fd))
SIMPLE(int, fallocate64, (int fd, int mode, off64_t at, off64_t n), (fd, mode, at, n), ON_FD(TRUNCATE, fd))
int posix_fallocate(int fd, off_t at, off_t n) { return fallocate(fd, 0, at, n) == 0 ? 0 : errno; }
int posix_fallocate64(int fd, off64_t at, off64_t n) { return fallocate64(fd, 0, at, n) == 0 ? 0 : errno; }

static void *mapped(void *hint, size_t n, int protection, int flags, int fd, off64_t at) {
    char where[PATH_MAX];
    struct entry entry = {NULL, PASS};
    if (control != NULL && fd >= 0 && !(flags & MAP_ANONYMOUS)) {
        of_fd(fd, where);
        entry = enter(MAP, where, flags & MAP_SHARED && protection & PROT_WRITE ? "writable" : NULL);
        if (entry.action == FAIL) return MAP_FAILED;
    }
    void *found = (void *)syscall(SYS_mmap, hint, n, protection, flags, fd, at);
    leave(entry, found == MAP_FAILED ? -1 : 0);
    return found;
}
void *mmap(void *hint, size_t n, int protection, int flags, int fd, off_t at) {
    return mapped(hint, n, protection, flags, fd, at);
}
void *mmap64(void *hint, size_t n, int protection, int flags, int fd, off64_t at) {
    return mapped(hint, n, protection, flags, fd, at);
}

/* --- to the disk --- */

SIMPLE(int, fsync, (int fd), (fd), ON_FD(SYNC, fd))
SIMPLE(int, fdatasync, (int fd), (fd), ON_FD(SYNC, fd))
SIMPLE(int, syncfs, (int fd), (fd), ON_FD(SYNC, fd))
SIMPLE(int, sync_file_range, (int fd, off64_t at, off64_t n, unsigned flags), (fd, at, n, flags), ON_FD(FLUSH, fd))

/* --- names --- */

SIMPLE(int, rename, (const char *from, const char *to), (from, to), ON_TWO(RENAME, AT_FDCWD, from, AT_FDCWD, to))
SIMPLE(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), ON_TWO(RENAME, a, from, b, to))
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(renameat2);
    if (control != NULL && control->no_exchange && flags) {
        errno = EINVAL;
        return -1;
    }
    ON_TWO(RENAME, a, from, b, to);
    return leave(entry, real(a, from, b, to, flags));
}
SIMPLE(int, unlink, (const char *path), (path), ON_PATH(UNLINK, AT_FDCWD, path))
SIMPLE(int, remove, (const char *path), (path), ON_PATH(UNLINK, AT_FDCWD, path))
int unlinkat(int directory, const char *path, int flags) {
    REAL(unlinkat);
    ON_PATH(flags & AT_REMOVEDIR ? RMDIR : UNLINK, directory, path);
    return leave(entry, real(directory, path, flags));
}
SIMPLE(int, rmdir, (const char *path), (path), ON_PATH(RMDIR, AT_FDCWD, path))
SIMPLE(int, mkdir, (const char *path, mode_t mode), (path, mode), ON_PATH(MKDIR, AT_FDCWD, path))
SIMPLE(int, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), ON_PATH(MKDIR, at, path))
SIMPLE(int, link, (const char *from, const char *to), (from, to), ON_TWO(LINK, AT_FDCWD, from, AT_FDCWD, to))
SIMPLE(int, linkat, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags),
       ON_TWO(LINK, a, from, b, to))
SIMPLE(int, symlink, (const char *to, const char *path), (to, path), ON_PATH(LINK, AT_FDCWD, path))
SIMPLE(int, symlinkat, (const char *to, int at, const char *path), (to, at, path), ON_PATH(LINK, at, path))
SIMPLE(int, flock, (int fd, int how), (fd, how), ON_FD(LOCK, fd))

/* --- what is said of files --- */

SIMPLE(int, chmod, (const char *path, mode_t mode), (path, mode), ON_PATH(ATTRIBUTES, AT_FDCWD, path))
SIMPLE(int, fchmod, (int fd, mode_t mode), (fd, mode), ON_FD(ATTRIBUTES, fd))
SIMPLE(int, fchmodat, (int at, const char *path, mode_t mode, int flags), (at, path, mode, flags),
       ON_PATH(ATTRIBUTES, at, path))
SIMPLE(int, utimensat, (int at, const char *path, const struct timespec times[2], int flags), (at, path, times, flags),
       ON_PATH(ATTRIBUTES, at, path))
SIMPLE(int, futimens, (int fd, const struct timespec times[2]), (fd, times), ON_FD(ATTRIBUTES, fd))

SIMPLE(int, stat, (const char *path, struct stat *into), (path, into), ON_PATH(STAT, AT_FDCWD, path))
SIMPLE(int, stat64, (const char *path, struct stat64 *into), (path, into), ON_PATH(STAT, AT_FDCWD, path))
SIMPLE(int, lstat, (const char *path, struct stat *into), (path, into), ON_PATH(STAT, AT_FDCWD, path))
SIMPLE(int, lstat64, (const char *path, struct stat64 *into), (path, into), ON_PATH(STAT, AT_FDCWD, path))
SIMPLE(int, fstat, (int fd, struct stat *into), (fd, into), ON_FD(STAT, fd))
SIMPLE(int, fstat64, (int fd, struct stat64 *into), (fd, into), ON_FD(STAT, fd))
SIMPLE(int, fstatat, (int at, const char *path, struct stat *into, int flags), (at, path, into, flags),
       ON_PATH(STAT, at, path))
SIMPLE(int, fstatat64, (int at, const char *path, struct stat64 *into, int flags), (at, path, into, flags),
       ON_PATH(STAT, at, path))
SIMPLE(int, statx, (int at, const char *path, int flags, unsigned mask, struct statx *into),
       (at, path, flags, mask, into), ON_PATH(STAT, at, path))
SIMPLE(int, access, (const char *path, int how), (path, how), ON_PATH(STAT, AT_FDCWD, path))
SIMPLE(int, faccessat, (int at, const char *path, int how, int flags), (at, path, how, flags),
       ON_PATH(STAT, at, path))
SIMPLE(ssize_t, readlink, (const char *path, char *into, size_t n), (path, into, n), ON_PATH(READLINK, AT_FDCWD, path))
SIMPLE(ssize_t, readlinkat, (int at, const char *path, char *into, size_t n), (at, path, into, n),
       ON_PATH(READLINK, at, path))
SIMPLE(int, statvfs, (const char *path, struct statvfs *into), (path, into), ON_PATH(SPACE, AT_FDCWD, path))
SIMPLE(int, statvfs64, (const char *path, struct statvfs64 *into), (path, into), ON_PATH(SPACE, AT_FDCWD, path))
SIMPLE(int, fstatvfs, (int fd, struct statvfs *into), (fd, into), ON_FD(SPACE, fd))
SIMPLE(int, fstatvfs64, (int fd, struct statvfs64 *into), (fd, into), ON_FD(SPACE, fd))

/* What programs built for older C libraries call instead of stat(). */
int __xstat64(int version, const char *path, struct stat64 *into);
int __lxstat64(int version, const char *path, struct stat64 *into);
int __fxstat64(int version, int fd, struct stat64 *into);
int __fxstatat64(int version, int at, const char *path, struct stat64 *into, int flags);
SIMPLE(int, __xstat64, (int version, const char *path, struct stat64 *into), (version, path, into),
       ON_PATH(STAT, AT_FDCWD, path))
SIMPLE(int, __lxstat64, (int version, const char *path, struct stat64 *into), (version, path, into),
       ON_PATH(STAT, AT_FDCWD, path))
SIMPLE(int, __fxstat64, (int version, int fd, struct stat64 *into), (version, fd, into), ON_FD(STAT, fd))
SIMPLE(int, __fxstatat64, (int version, int at, const char *path, struct stat64 *into, int flags),
       (version, at, path, into, flags), ON_PATH(STAT, at, path))

/* --- directories: reading them fails where they are opened --- */

#define ON_LIST(of) \
    if (control == NULL) return real(given); \
    char where[PATH_MAX]; \
    of; \
    struct entry entry = enter(LIST, where, NULL); \
    DIR *found = entry.action == FAIL ? NULL : real(given); \
    leave(entry, found == NULL ? -1 : 0); \
    return found
DIR *opendir(const char *given) {
    REAL(opendir);
    ON_LIST(of_path(AT_FDCWD, given, where));
}
DIR *fdopendir(int given) {
    REAL(fdopendir);
    ON_LIST(of_fd(given, where));
}

/* Half of a directory, and then an error: only the last call of readdir, which finds no more, is counted. */
#define ON_ENTRIES(type, name) \
    type *name(DIR *directory) { \
        REAL(name); \
        if (control == NULL) return real(directory); \
        errno = 0; \
        type *found = real(directory); \
        if (found != NULL || errno) return found; \
        char where[PATH_MAX]; \
        of_fd(dirfd(directory), where); \
        struct entry entry = enter(LIST, where, NULL); \
        if (entry.action != FAIL) { \
            leave(entry, 0); \
            errno = 0; \
        } \
        return NULL; \
    }
ON_ENTRIES(struct dirent, readdir)
ON_ENTRIES(struct dirent64, readdir64)

/* --- calls by number --- */

long syscall(long number, ...) {
    static long (*real)(long, ...);
    if (real == NULL) real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    va_list more;
    va_start(more, number);
    long a = va_arg(more, long), b = va_arg(more, long), c = va_arg(more, long), d = va_arg(more, long),
         e = va_arg(more, long), f = va_arg(more, long);
    va_end(more);
    if (control != NULL && number == SYS_renameat2)
        return renameat2((int)a, (const char *)b, (int)c, (const char *)d, (unsigned)e);
    if (control != NULL && number == SYS_statx)
        return statx((int)a, (const char *)b, (int)c, (unsigned)d, (struct statx *)e);
    if (control != NULL && number == SYS_copy_file_range)
        return copy_file_range((int)a, (off64_t *)b, (int)c, (off64_t *)d, (size_t)e, (unsigned)f);
    return real(number, a, b, c, d, e, f);
}
