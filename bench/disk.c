/* Preloaded into a program, this writes down what it does to the files of a folder and what it
   sends to its callers, in one order for all its processes; and lets syncs and writes fail.

   DISK_FOLDER is the folder, DISK_LOG the file of what was done (see `Record` in powercut.py), and
   DISK_FAULTS a file of four integers: which calls fail, with which error, how often, how late. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
enum { SYNCS = 1, WRITES = 2, SHORT = -1, FOR_EVER = -1 };

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static const char *folder;
static int log_file = -1;
static struct { volatile int calls, error, count, milliseconds; } *faults;

static void begin(void) {
    const char *log_name = getenv("DISK_LOG"), *faults_name = getenv("DISK_FAULTS");
    if (!(folder = getenv("DISK_FOLDER"))) return;
    log_file = REAL(open)(log_name, O_WRONLY | O_APPEND | O_CLOEXEC);
    int file = REAL(open)(faults_name, O_RDWR | O_CLOEXEC);
    faults = mmap(NULL, sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
}
/* A process that has no folder leaves all as it is, but those that it forks may have one. */
__attribute__((constructor)) static void load(void) {
    begin();
    pthread_atfork(NULL, NULL, begin);
}

/* One call at a time, in all processes, so that the order in the log is the order on the disk. */
static void lock(void) {
    pthread_mutex_lock(&turn);
    flock(log_file, LOCK_EX);
}
static void unlock(void) {
    int error = errno;
    flock(log_file, LOCK_UN);
    pthread_mutex_unlock(&turn);
    errno = error;
}

static void note(char kind, const char *name, long at, const void *data, long size) {
    long head[] = {kind, at, strlen(name), size};
    struct iovec parts[] = {{head, sizeof head}, {(void *)name, head[2]}, {(void *)data, size}};
    if (log_file >= 0 && REAL(writev)(log_file, parts, 3) != (long)sizeof head + head[2] + size) abort();
}

/* Give the path of a file that is open, or of a name in an open folder; whether it is of interest. */
static int path_of(int file, const char *name, char *path) {
    long size = 0;
    if (!folder) return 0;
    if (file != AT_FDCWD && (!name || name[0] != '/')) {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
        size = readlink(link, path, PATH_MAX - 1);
        if (size < 0) return 0;
        if (name) path[size++] = '/';
    }
    snprintf(path + size, PATH_MAX - size, "%s", name ? name : "");
    return strncmp(path, folder, strlen(folder)) == 0;
}

/* Take the fault that is due: return 0 for none, SHORT, or an error. */
static int fault(int call) {
    if (!(faults->calls & call) || !faults->count) return 0;
    if (faults->count > 0) faults->count--;
    usleep(faults->milliseconds * 1000L);
    return faults->error;
}

/* Write at a place, or where the file stands (-1), and note what was written. */
static ssize_t put(int file, const struct iovec *parts, int count, long at) {
    char path[PATH_MAX];
    struct stat state;
    int is_file = path_of(file, NULL, path);
    int failure = is_file ? fault(WRITES) : 0;
    struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2};
    if (failure == SHORT) parts = &half, count = 1;
    if (failure > 0) return errno = failure, -1;
    struct sockaddr own = {.sa_family = AF_UNSPEC};
    if (!is_file && folder) getsockname(file, &own, &(socklen_t){sizeof own});
    if (!is_file && own.sa_family != AF_INET)  /* Nor what a signal's handler writes to itself. */
        return at < 0 ? REAL(writev)(file, parts, count) : REAL(pwritev)(file, parts, count, at);
    lock();
    long place = at >= 0 ? at : lseek(file, 0, SEEK_CUR);
    if (at < 0 && is_file && fcntl(file, F_GETFL) & O_APPEND && !fstat(file, &state))
        place = state.st_size;
    ssize_t done = at < 0 ? REAL(writev)(file, parts, count) : REAL(pwritev)(file, parts, count, at);
    long left = done;
    for (int n = 0; n < count && left > 0; left -= parts[n++].iov_len) {
        long size = left < (long)parts[n].iov_len ? left : (long)parts[n].iov_len;
        note(is_file ? 'W' : 'A', path, place, parts[n].iov_base, size);
        place += size;
    }
    unlock();
    return done;
}

ssize_t write(int file, const void *data, size_t size) {
    return put(file, &(struct iovec){(void *)data, size}, 1, -1);
}
ssize_t writev(int file, const struct iovec *parts, int count) { return put(file, parts, count, -1); }
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    return put(file, &(struct iovec){(void *)data, size}, 1, at);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    return pwrite(file, data, size, at);
}
/* A sync that fails loses what it was for, also where a later one succeeds: as Linux does it. */
static int sync_file(int file, int (*real)(int)) {
    char path[PATH_MAX];
    if (!path_of(file, NULL, path)) return real(file);
    int failure = fault(SYNCS);
    lock();
    int result = failure > 0 ? -1 : real(file);
    note(result ? 'L' : 'S', path, 0, "", 0);
    unlock();
    if (failure > 0) errno = failure;
    return result;
}
int fsync(int file) { return sync_file(file, REAL(fsync)); }
int fdatasync(int file) { return sync_file(file, REAL(fdatasync)); }

int ftruncate(int file, off_t size) {
    char path[PATH_MAX];
    if (!path_of(file, NULL, path)) return REAL(ftruncate)(file, size);
    lock();
    int result = REAL(ftruncate)(file, size);
    if (!result) note('T', path, size, "", 0);
    unlock();
    return result;
}
int ftruncate64(int file, off64_t size) { return ftruncate(file, size); }

int openat(int at, const char *name, int flags, ...) {
    char path[PATH_MAX];
    va_list rest;
    va_start(rest, flags);
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;
    va_end(rest);
    if (!(flags & (O_CREAT | O_TRUNC)) || !path_of(at, name, path))
        return REAL(openat)(at, name, flags, mode);
    lock();
    int is_new = faccessat(at, name, F_OK, 0);
    int file = REAL(openat)(at, name, flags, mode);
    if (file >= 0 && is_new) note('C', path, 0, "", 0);
    else if (file >= 0 && flags & O_TRUNC) note('T', path, 0, "", 0);
    unlock();
    return file;
}
#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list rest; \
    va_start(rest, flags); \
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; \
    va_end(rest); \
    return openat(AT_FDCWD, path, flags, mode); \
}
OPEN(open)
OPEN(open64)
int openat64(int at, const char *name, int flags, ...) __attribute__((alias("openat")));

int rename(const char *old, const char *new) {
    char path[PATH_MAX];
    if (!path_of(AT_FDCWD, new, path)) return REAL(rename)(old, new);
    lock();
    int result = REAL(rename)(old, new);
    if (!result) note('R', old, 0, new, strlen(new));
    unlock();
    return result;
}

int unlinkat(int at, const char *name, int flags) {
    char path[PATH_MAX];
    if (flags & AT_REMOVEDIR || !path_of(at, name, path)) return REAL(unlinkat)(at, name, flags);
    lock();
    int result = REAL(unlinkat)(at, name, flags);
    if (!result) note('U', path, 0, "", 0);
    unlock();
    return result;
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
