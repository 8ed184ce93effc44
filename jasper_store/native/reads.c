/* Reads scattered rows of files into memory: many reads in flight, past the page cache, without the interpreter.
 *
 * A read costs a disk as much as some more pages of a longer one, so rows that lie near each other are read in one run,
 * together with the bytes between them. A run is read piece by piece into a small buffer, and the rows are copied out
 * of it while they are in the processor's cache. All of this goes in short steps, which a helper thread runs between
 * other work. Measured figures are in docs/notes-paging.md.
 *
 * Reads are queued with Linux AIO, which works in containers whose seccomp profile blocks io_uring.
 */
#define _GNU_SOURCE
#include "helpers.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    PAGE = 4096,
    QUEUE_DEPTH = 32,            /* reads in flight, at most */
    MAX_READ_NBYTES = 128 << 10, /* bytes of one read, at most */
    MAX_RUN_NBYTES = 512 << 10,  /* the same of a read that needs no buffer */
    STEP_READS = 8,              /* reads that one background step submits, and completes: some 50 us */
    BUFFER_NBYTES = QUEUE_DEPTH * MAX_READ_NBYTES,
};

/* Result of jasper_finish_read. Errors of a tensor are tensor_error(tensor, kind, the system's error number or 0).
 * reads.py knows these numbers. */
enum { NO_MEMORY = -1, FORKED = -2, ROW_MISSING = 1, FILE_ENDS = 2, UNREADABLE = 3 };
enum { KIND_BITS = 2, NUMBER_BITS = 14 };

static int64_t tensor_error(int64_t tensor, int kind, int number)
{
    return tensor << (KIND_BITS + NUMBER_BITS) | (int64_t)number << KIND_BITS | kind;
}

/* Where the rows of a tensor lie. RowLayout in reads.py packs it. */
struct row_layout {
    int64_t file;   /* descriptor opened with O_DIRECT, or -1: the rows are in memory */
    int64_t base;   /* of row 0: offset in the file, or address */
    int64_t stride; /* bytes from one row to the next */
    int64_t n_rows;
    int64_t end; /* offset in the file after the last byte of the tensor */
};

struct reader {
    aio_context_t queue;          /* 0: the system refused one, and each read is a pread */
    char *buffer;                 /* MAX_READ_NBYTES for each read in flight, or NULL */
    struct read_request *request; /* begun and not finished, or NULL */
    unsigned fork_generation;     /* of the process that all of these belong to */
};

/* A row of a request that has to be read from a file. */
struct file_row {
    int64_t tensor, row;
    uint64_t index; /* position in the request */
    int64_t offset; /* in the file */
};

struct read {
    int file;
    int64_t offset, nbytes;
    int64_t needed; /* fewer bytes than this are an error; the file may end after them */
    int64_t tensor;
    char *target; /* memory that is read to, or NULL: a buffer, out of which rows are copied */
    uint64_t first_row, end_row; /* the file rows that this read has a part of are among these */
};

struct read_list {
    struct read *items;
    uint64_t count, capacity;
};

/* Bytes of a file, and the memory that they are read to. RUN_FIELDS in reads.py packs it. */
struct byte_run {
    int64_t file, offset, nbytes; /* the last two are multiples of a page */
    int64_t needed;               /* fewer bytes than this are an error; the file may end after them */
    int64_t target;               /* address of a page */
};

/* Arguments of jasper_begin_read. */
struct arguments {
    const struct row_layout *tensors;
    uint64_t n_tensors;
    int64_t row_nbytes, max_gap;
    const int64_t *tensor_of, *rows;
    uint64_t n;
    int64_t zero_row;
    char *target;
    int64_t *addresses;
};

/* A request for rows, and how far it has got. */
struct read_request {
    struct background_task task;
    int in_background; /* whether a helper runs it */
    struct arguments args;
    int64_t error;         /* as jasper_finish_read returns it; after an error no more reads are submitted */
    int planned;           /* whether `reads` is complete */
    struct file_row *rows; /* NULL for runs of bytes */
    struct read_list reads;
    uint64_t next_read; /* the first that was not submitted */
    aio_context_t queue; /* 0: none, or it was lost */
    char *buffer;        /* another one than the reader's if the queue was lost and may still write into that */
    struct iocb iocbs[QUEUE_DEPTH]; /* each reads into its own part of the buffer */
    unsigned free_iocbs[QUEUE_DEPTH], n_free, in_flight;
};

int64_t jasper_finish_read(struct reader *reader);

static void open_queue(struct reader *reader)
{
    reader->fork_generation = jasper_fork_generation();
    reader->queue = 0;
    if (syscall(SYS_io_setup, QUEUE_DEPTH, &reader->queue) != 0)
        reader->queue = 0;
}

struct reader *jasper_open_reader(void)
{
    struct reader *reader = calloc(1, sizeof *reader);
    if (reader)
        open_queue(reader);
    return reader;
}

/* In a forked child neither the queue nor the buffer exists (other memory may have its address by now), and a helper of
 * the parent may have been working on the request, so that its memory cannot be freed. Returns whether that is so, and
 * then the reader is as if it had just been opened. */
static int renew_after_fork(struct reader *reader)
{
    if (reader->fork_generation == jasper_fork_generation())
        return 0;
    reader->buffer = NULL;
    reader->request = NULL;
    open_queue(reader);
    return 1;
}

void jasper_close_reader(struct reader *reader)
{
    if (!reader)
        return;
    if (reader->fork_generation == jasper_fork_generation()) {
        jasper_finish_read(reader);
        if (reader->queue)
            syscall(SYS_io_destroy, reader->queue);
        if (reader->buffer)
            munmap(reader->buffer, BUFFER_NBYTES);
    }
    free(reader);
}

/* Allocate a buffer, in huge pages if there are any: the kernel looks up each page that it reads into. Returns NULL
 * without memory. */
static char *allocate_buffer(void)
{
    char *buffer = mmap(NULL, BUFFER_NBYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED)
        return NULL;
    madvise(buffer, BUFFER_NBYTES, MADV_HUGEPAGE);
    /* A page that the disk is writing into must not become shared with a forked child: see O_DIRECT and fork in
     * open(2). */
    madvise(buffer, BUFFER_NBYTES, MADV_DONTFORK);
    return buffer;
}

/* By tensor, then by row. */
static int compare_rows(const void *a, const void *b)
{
    const struct file_row *one = a, *other = b;
    if (one->tensor != other->tensor)
        return one->tensor < other->tensor ? -1 : 1;
    return (one->row > other->row) - (one->row < other->row);
}

/* Split a run of bytes into reads and append them. Returns 0 without memory. */
static int append_run(struct read_list *reads, struct read run, const struct file_row *rows, int64_t row_nbytes)
{
    const int64_t most = run.target ? MAX_RUN_NBYTES : MAX_READ_NBYTES;
    while (run.nbytes > 0) {
        if (reads->count == reads->capacity) {
            const uint64_t capacity = reads->capacity ? 2 * reads->capacity : 256;
            struct read *items = realloc(reads->items, capacity * sizeof *items);
            if (!items)
                return 0;
            reads->items = items, reads->capacity = capacity;
        }
        struct read read = run;
        if (read.nbytes > most)
            read.nbytes = most;
        if (read.needed > read.nbytes)
            read.needed = read.nbytes;
        reads->items[reads->count++] = read;
        run.offset += read.nbytes, run.nbytes -= read.nbytes, run.needed -= read.needed;
        if (run.target)
            run.target += read.nbytes;
        while (run.first_row < run.end_row && rows[run.first_row].offset + row_nbytes <= run.offset)
            run.first_row++;
    }
    return 1;
}

/* Append the reads that cover the rows of one tensor, rows[start] to rows[start + n - 1], in ascending order. Returns 0
 * without memory. */
static int plan_tensor(const struct row_layout *layout, int64_t tensor, struct file_row *rows, uint64_t start,
                       uint64_t n, int64_t row_nbytes, int64_t max_gap, struct read_list *reads)
{
    const uint64_t end = start + n;
    int64_t run_begin = 0, run_end = -1; /* whole pages; run_end < 0: there is no run */
    uint64_t first_row = start;
    for (uint64_t i = start; i <= end; i++) {
        int64_t page = 0;
        if (i < end) {
            rows[i].offset = layout->base + rows[i].row * layout->stride;
            page = rows[i].offset / PAGE * PAGE;
        }
        if (run_end >= 0 && (i == end || page > run_end + max_gap)) {
            const int64_t needed = (run_end < layout->end ? run_end : layout->end) - run_begin;
            const struct read run = {(int)layout->file, run_begin, run_end - run_begin, needed, tensor, NULL, first_row, i};
            if (!append_run(reads, run, rows, row_nbytes))
                return 0;
            run_end = -1;
        }
        if (i == end)
            break;
        if (run_end < 0)
            run_begin = page, first_row = i;
        const int64_t row_end = (rows[i].offset + row_nbytes + PAGE - 1) / PAGE * PAGE;
        if (row_end > run_end)
            run_end = row_end;
    }
    return 1;
}

/* Plan all reads, and set the address that each row will have. Returns an error as jasper_finish_read does. */
static int64_t plan_reads(struct read_request *request)
{
    const struct arguments *args = &request->args;
    struct file_row *rows = request->rows = malloc((args->n + 1) * sizeof *rows);
    if (!rows)
        return NO_MEMORY;
    for (uint64_t i = 0; i < args->n; i++)
        args->addresses[i] = args->zero_row;
    uint64_t count = 0;
    int sorted = 1;
    for (uint64_t i = 0; i < args->n; i++) {
        const int64_t tensor = args->tensor_of[i], row = args->rows[i];
        if (tensor < 0 || (uint64_t)tensor >= args->n_tensors)
            continue;
        const struct row_layout *layout = &args->tensors[tensor];
        if (row < 0 || row >= layout->n_rows)
            return tensor_error(tensor, ROW_MISSING, 0);
        if (layout->file < 0) {
            args->addresses[i] = layout->base + row * layout->stride;
            continue;
        }
        rows[count] = (struct file_row){tensor, row, i, 0};
        sorted &= !count || compare_rows(&rows[count - 1], &rows[count]) <= 0;
        count++;
    }
    if (!sorted)
        qsort(rows, count, sizeof *rows, compare_rows);
    for (uint64_t start = 0, n; start < count; start += n) {
        const int64_t tensor = rows[start].tensor;
        for (n = 1; start + n < count && rows[start + n].tensor == tensor;)
            n++;
        if (!plan_tensor(&args->tensors[tensor], tensor, rows, start, n, args->row_nbytes, args->max_gap,
                         &request->reads))
            return NO_MEMORY;
    }
    for (uint64_t i = 0; i < count; i++)
        args->addresses[rows[i].index] = (int64_t)(intptr_t)args->target + (int64_t)i * args->row_nbytes;
    return 0;
}

/* Finish an interrupted or short read with pread, from byte `done` on. Returns 0 if all needed bytes are there, FILE_ENDS,
 * or UNREADABLE with errno set. */
static int finish_short_read(const struct read *read, char *buffer, int64_t done)
{
    while (done < read->needed) {
        const ssize_t got =
            pread(read->file, buffer + done, (size_t)(read->nbytes - done), (off_t)(read->offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got ? UNREADABLE : FILE_ENDS;
        done += got;
    }
    return 0;
}

/* Copy the parts of rows that a read brought to their place in the target. */
static void copy_to_target(const struct read_request *request, const struct read *read, const char *buffer)
{
    const int64_t read_end = read->offset + read->nbytes, row_nbytes = request->args.row_nbytes;
    for (uint64_t i = read->first_row; i < read->end_row && request->rows[i].offset < read_end; i++) {
        const int64_t begin = request->rows[i].offset, end = begin + row_nbytes;
        const int64_t from = begin > read->offset ? begin : read->offset, to = end < read_end ? end : read_end;
        char *row = request->args.target + (int64_t)i * row_nbytes;
        memcpy(row + (from - begin), buffer + (from - read->offset), (size_t)(to - from));
    }
}

static void complete_read(struct read_request *request, const struct read *read, char *buffer, int64_t done)
{
    const int failure = finish_short_read(read, buffer, done);
    if (!failure && !read->target)
        copy_to_target(request, read, buffer);
    else if (failure && !request->error)
        request->error = tensor_error(read->tensor, failure, failure == UNREADABLE ? errno : 0);
}

/* Where the bytes of a read go: `iocb` is the one that it is submitted by. */
static char *buffer_of(const struct read_request *request, const struct read *read, unsigned iocb)
{
    return read->target ? read->target : request->buffer + (size_t)iocb * MAX_READ_NBYTES;
}

/* The system does not say any more which reads have arrived, as in a process that entered a sandbox: do without the
 * queue, and read with pread what was in flight. */
static void lose_queue(struct read_request *request)
{
    int in_flight[QUEUE_DEPTH];
    for (unsigned i = 0; i < QUEUE_DEPTH; i++)
        in_flight[i] = 1;
    for (unsigned i = 0; i < request->n_free; i++)
        in_flight[request->free_iocbs[i]] = 0;
    /* Destroying a queue waits for its reads. If that fails too they may arrive at any time: the buffer is left to
     * them. */
    if (syscall(SYS_io_destroy, request->queue) != 0)
        request->buffer = allocate_buffer();
    request->queue = 0;
    request->n_free = request->in_flight = 0;
    if (!request->buffer && request->rows && !request->error)
        request->error = NO_MEMORY;
    for (unsigned i = 0; i < QUEUE_DEPTH && !request->error; i++)
        if (in_flight[i]) {
            const struct read *read = &request->reads.items[request->iocbs[i].aio_data];
            complete_read(request, read, buffer_of(request, read, 0), 0);
        }
}

/* Complete up to `most` reads that have arrived. Waits until at least `least` have, without a time limit. */
static void poll_completions(struct read_request *request, long least, unsigned most)
{
    struct io_event events[QUEUE_DEPTH];
    struct timespec no_wait = {0};
    const long count =
        syscall(SYS_io_getevents, request->queue, least, (long)most, events, least ? NULL : &no_wait);
    if (count < 0 && errno != EINTR)
        lose_queue(request);
    for (long k = 0; k < count; k++) {
        const unsigned iocb = (unsigned)((struct iocb *)(uintptr_t)events[k].obj - request->iocbs);
        const int64_t done = events[k].res > 0 ? events[k].res : 0;
        const struct read *read = &request->reads.items[events[k].data];
        complete_read(request, read, buffer_of(request, read, iocb), done);
        request->free_iocbs[request->n_free++] = iocb;
        request->in_flight--;
    }
}

/* Submit up to `most` reads, as far as the queue has room. */
static void submit_reads(struct read_request *request, unsigned most)
{
    struct iocb *batch[QUEUE_DEPTH];
    unsigned count = 0;
    for (; count < most && count < request->n_free && request->next_read + count < request->reads.count; count++) {
        const struct read *read = &request->reads.items[request->next_read + count];
        const unsigned number = request->free_iocbs[request->n_free - 1 - count];
        struct iocb *iocb = batch[count] = &request->iocbs[number];
        memset(iocb, 0, sizeof *iocb);
        iocb->aio_lio_opcode = IOCB_CMD_PREAD;
        iocb->aio_fildes = (uint32_t)read->file;
        iocb->aio_buf = (uint64_t)(uintptr_t)buffer_of(request, read, number);
        iocb->aio_nbytes = (uint64_t)read->nbytes;
        iocb->aio_offset = read->offset;
        iocb->aio_data = request->next_read + count;
    }
    const long taken = count ? syscall(SYS_io_submit, request->queue, (long)count, batch) : 0;
    if (taken <= 0)
        return;
    request->n_free -= (unsigned)taken, request->in_flight += (unsigned)taken, request->next_read += (uint64_t)taken;
}

/* Complete and submit up to `most` reads. Waits for `least` completions if that is not 0. Returns BUSY, DRAINING or
 * DONE. */
static int advance(struct read_request *request, long least, unsigned most)
{
    if (!request->planned) {
        request->error = plan_reads(request);
        request->planned = 1;
    }
    if (request->in_flight)
        poll_completions(request, least, most);
    if (request->next_read < request->reads.count && !request->error) {
        submit_reads(request, most);
        if (!request->in_flight) {
            /* There is no queue, or it accepts nothing: read the next one with pread. */
            const struct read *read = &request->reads.items[request->next_read++];
            complete_read(request, read, buffer_of(request, read, 0), 0);
        }
    }
    if (request->next_read < request->reads.count && !request->error)
        return BUSY;
    return request->in_flight ? DRAINING : DONE;
}

static int background_step(struct background_task *task)
{
    return advance((struct read_request *)task, 0, STEP_READS);
}

static void run_in_caller(struct read_request *request)
{
    for (long least = 0; advance(request, least, QUEUE_DEPTH) != DONE;) {
        /* Wait for several completions: io_submit notifies the disk once per call, however many reads it has. */
        const long in_flight = request->in_flight;
        least = in_flight > QUEUE_DEPTH / 2 ? in_flight - QUEUE_DEPTH / 2 : 1;
    }
}

/* Begin a request that is filled in. */
static void begin(struct reader *reader, struct read_request *request)
{
    request->task.step = background_step;
    request->queue = reader->queue;
    request->buffer = reader->buffer;
    for (; reader->queue && request->n_free < QUEUE_DEPTH; request->n_free++)
        request->free_iocbs[request->n_free] = request->n_free;
    reader->request = request;
    request->in_background = jasper_submit_background(&request->task);
}

/* Begin to bring rows into memory. The caller keeps all arguments valid until jasper_finish_read returns.
 *
 * tensor_of: tensor number of each row, [n]; less than 0 names the row at address `zero_row`.
 * rows:      row number in its tensor, [n].
 * max_gap:   rows whose pages are at most this many bytes apart are read together.
 * target:    memory for the rows that are in files, one after the other.
 * addresses: address of each row, [n], set when the request is finished.
 *
 * Returns 0 if a request is open already, or without memory. */
int jasper_begin_read(struct reader *reader, const struct row_layout *tensors, uint64_t n_tensors, int64_t row_nbytes,
                      int64_t max_gap, const int64_t *tensor_of, const int64_t *rows, uint64_t n, int64_t zero_row,
                      char *target, int64_t *addresses)
{
    renew_after_fork(reader);
    struct read_request *request = reader->request ? NULL : calloc(1, sizeof *request);
    if (request && !reader->buffer)
        reader->buffer = allocate_buffer();
    if (!request || !reader->buffer) {
        free(request);
        return 0;
    }
    request->args =
        (struct arguments){tensors, n_tensors, row_nbytes, max_gap, tensor_of, rows, n, zero_row, target, addresses};
    begin(reader, request);
    return 1;
}

/* Begin to read runs of bytes to memory, without a copy. The caller keeps the memory valid until jasper_finish_read
 * returns, which then says `tensor` for the number of a run.
 *
 * Returns 0 if a request is open already, or without memory. */
int jasper_begin_runs(struct reader *reader, const struct byte_run *runs, uint64_t n)
{
    renew_after_fork(reader);
    struct read_request *request = reader->request ? NULL : calloc(1, sizeof *request);
    if (!request)
        return 0;
    for (uint64_t i = 0; i < n; i++) {
        const struct byte_run *run = &runs[i];
        const struct read read = {.file = (int)run->file, .offset = run->offset, .nbytes = run->nbytes,
                                  .needed = run->needed, .tensor = (int64_t)i,
                                  .target = (char *)(intptr_t)run->target};
        if (!append_run(&request->reads, read, NULL, 0)) {
            free(request->reads.items);
            free(request);
            return 0;
        }
    }
    request->planned = 1;
    begin(reader, request);
    return 1;
}

/* Wait for the open request. Returns 0, or NO_MEMORY, or FORKED: this process was forked from the one that began it, and
 * can begin it again, or an error of tensor t: it does not have a row (ROW_MISSING), its file ends before a row
 * (FILE_ENDS), or the system cannot read the file (UNREADABLE). */
int64_t jasper_finish_read(struct reader *reader)
{
    struct read_request *request = reader->request;
    if (renew_after_fork(reader))
        return request ? FORKED : 0;
    if (!request)
        return 0;
    reader->request = NULL;
    if (request->in_background)
        jasper_wait_background(&request->task);
    else
        run_in_caller(request);
    reader->queue = request->queue;
    reader->buffer = request->buffer;
    const int64_t error = request->error;
    free(request->reads.items);
    free(request->rows);
    free(request);
    return error;
}
