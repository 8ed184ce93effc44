/* Rows of a mapped file copied in ways that return an error where a page cannot be read, instead of ending the process. */
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/uio.h>
#include <unistd.h>

enum { VECTORS = 1024 };

/* A system call for each row. */
int64_t rows_by_pread(int file, const int64_t *rows, int64_t n, int64_t row_nbytes, char *target)
{
    for (int64_t i = 0; i < n; i++)
        if (pread(file, target + i * row_nbytes, (size_t)row_nbytes, rows[i] * row_nbytes) != row_nbytes)
            return -1;
    return 0;
}

/* A system call for 1024 rows, which reads this process's own memory as another one's. */
int64_t rows_by_process(const char *source, const int64_t *rows, int64_t n, int64_t row_nbytes, char *target)
{
    struct iovec remote[VECTORS];
    for (int64_t i = 0; i < n;) {
        int64_t count = 0;
        for (; count < VECTORS && i + count < n; count++)
            remote[count] = (struct iovec){(char *)source + rows[i + count] * row_nbytes, (size_t)row_nbytes};
        const struct iovec local = {target + i * row_nbytes, (size_t)(count * row_nbytes)};
        if (process_vm_readv(getpid(), &local, 1, remote, (unsigned long)count, 0) != count * row_nbytes)
            return -1;
        i += count;
    }
    return 0;
}
