/* Readings of random rows of files: finished, abandoned, of files that are cut meanwhile, in children that were forked
 * meanwhile. */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "faults.h"
#include "library.h"

enum { MOST_ROWS = 300, MAX_GAP = 3 * 4096, MEMORY_ROWS = 50, TENSORS = 3 };

static const int64_t row_sizes[] = {1, 7, 512, 1536, 4096, 5000, 200000};

/* A request, and everything that the library reads and writes until it is finished. */
struct begun {
    struct reader *reader;
    struct row_layout tensors[TENSORS];
    int64_t row_nbytes;
    uint64_t n;
    int64_t tensor_of[MOST_ROWS], rows[MOST_ROWS], addresses[MOST_ROWS];
    char *zeros, *memory, *target;
};

static int64_t kind_of(int64_t error) { return error & 3; }
static int64_t number_of(int64_t error) { return error >> 2 & 0x3FFF; }
static int64_t tensor_of(int64_t error) { return error >> 16; }

/* A thread uses a reader for several requests, as programs do: to destroy a queue takes the system 36 ms. A child inherits
 * that of the thread that forked it. */
static _Thread_local struct reader *kept;

static struct reader *take_reader(void)
{
    struct reader *reader = kept ? kept : jasper_open_reader();
    kept = NULL;
    return reader;
}

static void return_reader(struct rng *rng, struct reader *reader)
{
    if (!kept && below(rng, 60))
        kept = reader;
    else
        jasper_close_reader(reader);
}

void close_kept_reader(void)
{
    jasper_close_reader(kept);
    kept = NULL;
}

static void free_request(struct begun *begun)
{
    free(begun->zeros);
    free(begun->memory);
    free(begun->target);
    free(begun);
}

/* A file of so many bytes, in two tensors, and a third one in memory. */
static struct begun *make_request(struct rng *rng, int file, int64_t file_nbytes)
{
    struct begun *begun = need(sizeof *begun);
    const int64_t row = begun->row_nbytes = row_sizes[below(rng, 7)];
    for (int t = 0; t < 2; t++) {
        const int64_t base = (int64_t)below(rng, 9000), stride = row + (int64_t)below(rng, 3) * 100;
        const int64_t n_rows = (file_nbytes - base - row) / stride + 1;
        begun->tensors[t] = (struct row_layout){file, base, stride, n_rows, base + (n_rows - 1) * stride + row};
    }
    begun->memory = need((size_t)(MEMORY_ROWS * row));
    begun->zeros = need((size_t)row);
    memset(begun->zeros, 0, (size_t)row);
    for (int64_t i = 0; i < MEMORY_ROWS * row; i++)
        begun->memory[i] = (char)byte_at((uint64_t)i);
    begun->tensors[2] = (struct row_layout){-1, (int64_t)(intptr_t)begun->memory, row, MEMORY_ROWS, 0};
    if (PLANT_UB)
        begun->tensors[0].base = INT64_MAX - 10;
    begun->n = below(rng, 8) ? below(rng, row > 5000 ? 20 : MOST_ROWS) : 0;
    begun->target = need((size_t)row * begun->n);
    for (uint64_t i = 0; i < begun->n; i++) {
        begun->tensor_of[i] = (int64_t)below(rng, TENSORS + 1) - 1;
        begun->rows[i] = begun->tensor_of[i] < 0
                             ? (int64_t)below(rng, 9) - 4
                             : (int64_t)below(rng, (uint64_t)begun->tensors[begun->tensor_of[i]].n_rows);
    }
    return begun;
}

/* The planted race: the target is read before the request is finished. */
static unsigned peek(const struct begun *begun)
{
    const uint64_t nbytes = begun->n * (uint64_t)begun->row_nbytes;
    unsigned sum = 0;
    for (uint64_t k = 0; nbytes && k < 1000000; k++)
        sum += (unsigned char)begun->target[k % nbytes];
    return sum;
}

/* Returns 0 without memory. */
static int begin(struct begun *begun)
{
    const int is_begun = jasper_begin_read(
        begun->reader, begun->tensors, TENSORS, begun->row_nbytes, MAX_GAP, begun->tensor_of, begun->rows, begun->n,
        (int64_t)(intptr_t)begun->zeros, begun->target, begun->addresses);
    if (!is_begun)
        atomic_fetch_add(&counts.without_memory, 1);
    if (PLANT_RACE && is_begun)
        atomic_fetch_add(&counts.gathers, peek(begun));
    return is_begun;
}

/* Rows that lie below byte `whole` of their file are those of the file. */
static void check_rows(const struct begun *begun, int64_t whole)
{
    for (uint64_t i = 0; i < begun->n; i++) {
        const char *got = (const char *)(intptr_t)begun->addresses[i];
        const int64_t tensor = begun->tensor_of[i];
        if (tensor < 0) {
            CHECK(got == begun->zeros);
            continue;
        }
        const int64_t at = (tensor < 2 ? begun->tensors[tensor].base : 0) + begun->rows[i] * begun->tensors[tensor].stride;
        for (int64_t k = 0; k < begun->row_nbytes && (tensor == 2 || at + k < whole); k++)
            CHECK((unsigned char)got[k] == byte_at((uint64_t)(at + k)));
    }
}

void read_some(struct rng *rng, int file)
{
    struct begun *begun = make_request(rng, file, FILE_NBYTES);
    int64_t wrong = -1;
    if (begun->n && below(rng, 8) == 0) {
        const uint64_t at = below(rng, begun->n);
        wrong = begun->tensor_of[at] = (int64_t)below(rng, TENSORS);
        const int64_t bad[] = {-1, begun->tensors[wrong].n_rows, INT64_MAX, INT64_MIN};
        begun->rows[at] = bad[below(rng, 4)];
    }
    begun->reader = take_reader();
    const int is_begun = begun->reader && begin(begun);
    if (is_begun && below(rng, 12)) {
        CHECK(below(rng, 8) || !jasper_begin_read(begun->reader, begun->tensors, 0, 1, 0, NULL, NULL, 0, 0, NULL, NULL));
        const int64_t error = jasper_finish_read(begun->reader);
        if (error == NO_MEMORY)
            atomic_fetch_add(&counts.without_memory, 1);
        else if (wrong >= 0)
            CHECK(tensor_of(error) == wrong && kind_of(error) == ROW_MISSING);
        else
            CHECK(!error);
        if (!error) {
            check_rows(begun, FILE_NBYTES);
            atomic_fetch_add(&counts.reads, 1);
        }
        CHECK(jasper_finish_read(begun->reader) == 0);
        return_reader(rng, begun->reader);
    } else {
        atomic_fetch_add(&counts.abandoned, (unsigned long)is_begun);
        jasper_close_reader(begun->reader);
    }
    free_request(begun);
}

enum { CUT_NBYTES = 1 << 20 };

void read_while_cut(struct rng *rng, const char *directory)
{
    char path[4096];
    static atomic_ulong number;
    snprintf(path, sizeof path, "%s/cut-%d-%lu", directory, (int)getpid(), atomic_fetch_add(&number, 1));
    char *content = need(CUT_NBYTES);
    for (uint64_t i = 0; i < CUT_NBYTES; i++)
        content[i] = (char)byte_at(i);
    const int writing = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
    CHECK(writing >= 0 && write(writing, content, CUT_NBYTES) == CUT_NBYTES);
    int reading = open(path, O_RDONLY | O_DIRECT);
    if (reading < 0)
        reading = open(path, O_RDONLY);
    unlink(path);
    struct begun *begun = make_request(rng, reading, CUT_NBYTES);
    const int64_t size = (int64_t)below(rng, CUT_NBYTES);
    begun->reader = take_reader();
    if (begun->reader && begin(begun)) {
        CHECK(!ftruncate(writing, size));
        const int64_t error = jasper_finish_read(begun->reader);
        CHECK(!error || error == NO_MEMORY || (kind_of(error) == FILE_ENDS && tensor_of(error) < 2));
        if (!error)
            check_rows(begun, size);
        atomic_fetch_add(&counts.cut, 1);
    }
    return_reader(rng, begun->reader);
    free_request(begun);
    free(content);
    close(reading);
    close(writing);
}

struct begun *begin_reading(struct rng *rng, int file)
{
    struct begun *begun = make_request(rng, file, FILE_NBYTES);
    begun->reader = take_reader();
    if (begun->reader && begin(begun))
        return begun;
    jasper_close_reader(begun->reader);
    free_request(begun);
    return NULL;
}

void finish_reading(struct begun *begun, int in_child)
{
    if (!begun)
        return;
    int64_t error = jasper_finish_read(begun->reader);
    if (in_child) {
        CHECK(error == FORKED);
        error = begin(begun) ? jasper_finish_read(begun->reader) : NO_MEMORY;
    }
    CHECK(!error || error == NO_MEMORY);
    if (!error)
        check_rows(begun, FILE_NBYTES);
    jasper_close_reader(begun->reader);
    free_request(begun);
}

/* One row of a file that cannot be read at all. */
static void check_unreadable(int file, int64_t kind, int64_t number)
{
    const struct row_layout layout = {file, 0, 100, 10, 1000};
    const int64_t tensor = 0, row = 5;
    int64_t address;
    char target[100];
    struct reader *reader = jasper_open_reader();
    CHECK(jasper_begin_read(reader, &layout, 1, 100, MAX_GAP, &tensor, &row, 1, 0, target, &address));
    const int64_t error = jasper_finish_read(reader);
    CHECK(kind_of(error) == kind && number_of(error) == number && tensor_of(error) == 0);
    jasper_close_reader(reader);
}

void check_edges(int file)
{
    struct rng rng = {12345};
    jasper_close_reader(NULL);
    CHECK(jasper_gather(NULL, 0, 4) == 0);
    check_unreadable(-2 & 0xFFFF, UNREADABLE, EBADF);
    const int directory = open("/", O_RDONLY | O_DIRECTORY), empty = open("/dev/null", O_RDONLY);
    check_unreadable(directory, UNREADABLE, EISDIR);
    check_unreadable(empty, FILE_ENDS, 0);
    close(directory);
    close(empty);
    /* Without a queue, without a helper, without both; and with a queue that is lost under way. */
    for (int without = 0; without < 4; without++) {
        atomic_store(&no_queue, without & 1);
        atomic_store(&no_threads, without >> 1);
        close_kept_reader();
        for (int k = 0; k < 20; k++)
            read_some(&rng, file);
    }
    atomic_store(&no_queue, 0);
    close_kept_reader();
    for (int k = 0; k < 10; k++) {
        struct begun *begun = begin_reading(&rng, file);
        atomic_store(&lost_queue, 1);
        finish_reading(begun, 0);
        atomic_store(&lost_queue, 0);
    }
    atomic_store(&no_threads, 0);
}
