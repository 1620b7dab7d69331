/* Makes writes and fsyncs fail, for tests: loaded before the C library (LD_PRELOAD).
 *
 * The file named by VMKEEP_FAULTS says what fails, as "OPERATION ERRNO SUFFIX": "fsync 5 -wal" makes each fsync of a file
 * whose name ends with "-wal" fail with errno 5, "write 28 -wal" each write to it, "torn 28 -wal" the same after half of the first
 * write was carried out, "write 28 *" those to all files of the store. Without that file nothing fails. Each fsync of a file that
 * holds records appends a byte to the file's name with ".fsyncs". */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off64_t);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);
static int torn;

__attribute__((constructor)) static void find(void) {
  real_write = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
  real_pwrite = (ssize_t (*)(int, const void *, size_t, off64_t))dlsym(RTLD_NEXT, "pwrite64");
  real_fsync = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
  real_fdatasync = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
}

static int name_of(int fd, char *name, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, name, size - 1);
  if (n <= 0) return 0;
  name[n] = 0;
  return 1;
}

static int ends_with(const char *name, const char *suffix) {
  size_t n = strlen(name), s = strlen(suffix);
  return n >= s && strcmp(name + n - s, suffix) == 0;
}

/* The errno with which an operation on a file has to fail, 0 if it has not; in `how` what the rule says. */
static int rule(const char *operation, int fd, char *how) {
  const char *control = getenv("VMKEEP_FAULTS");
  char text[128], name[4096], suffix[64];
  int code = 0, saved = errno;
  if (!control) return 0;
  int file = open(control, O_RDONLY | O_CLOEXEC);
  errno = saved;
  if (file < 0) return 0;
  ssize_t n = read(file, text, sizeof text - 1);
  close(file);
  errno = saved;
  if (n <= 0) return 0;
  text[n] = 0;
  if (sscanf(text, "%15s %d %63s", how, &code, suffix) != 3) return 0;
  if (strcmp(how, operation) != 0 && !(strcmp(how, "torn") == 0 && strcmp(operation, "write") == 0)) return 0;
  if (!name_of(fd, name, sizeof name) || !strstr(name, "/store/")) return 0;
  return strcmp(suffix, "*") == 0 || ends_with(name, suffix) ? code : 0;
}

static void count(int fd) {
  const char *control = getenv("VMKEEP_FAULTS");
  char name[4096];
  if (!control || !name_of(fd, name, sizeof name)) return;
  if (!ends_with(name, "journal.db") && !ends_with(name, "journal.db-wal") && !ends_with(name, "journal.sled/db")) return;
  snprintf(name, sizeof name, "%s.fsyncs", control);
  int file = open(name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (file >= 0) {
    if (real_write(file, "x", 1) != 1) abort();
    close(file);
  }
}

static int sync_with(int (*real)(int), int fd) {
  char how[16];
  int code = rule("fsync", fd, how);
  count(fd);
  if (code) {
    errno = code;
    return -1;
  }
  return real(fd);
}

int fsync(int fd) { return sync_with(real_fsync, fd); }
int fdatasync(int fd) { return sync_with(real_fdatasync, fd); }

ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t at) {
  char how[16];
  int code = rule("write", fd, how);
  if (!code) {
    torn = 0;
    return real_pwrite(fd, bytes, size, at);
  }
  if (strcmp(how, "torn") == 0 && !torn && size > 1) {
    torn = 1;
    return real_pwrite(fd, bytes, size / 2, at);
  }
  errno = code;
  return -1;
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t at) { return pwrite64(fd, bytes, size, at); }

ssize_t write(int fd, const void *bytes, size_t size) {
  char how[16];
  int code = rule("write", fd, how);
  if (code) {
    errno = code;
    return -1;
  }
  return real_write(fd, bytes, size);
}
