/* Brings scattered rows of files into memory: many reads at once, past the page cache, without the interpreter.
 *
 * A read costs a disk as much as some more pages of one, so rows that lie near each other are read in one run with what
 * is between them, piece by piece into a small buffer, and copied out of it while they are in the processor's cache. All
 * of it goes in short steps, which a helping thread does between others. Measured figures stand in docs/notes-paging.md.
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
    DEPTH = 32,              /* reads under way at a time */
    READ_NBYTES = 128 << 10, /* of one read, at most */
    STEP_READS = 8,          /* handed over in a step, and taken in: some 50 us */
    BUFFER_NBYTES = DEPTH * READ_NBYTES,
    NO_MEMORY = -1,
    ANOTHER_PROCESS = -2,
};

/* Where the rows of a tensor lie. As RowReader in reads.py packs it. */
struct rows_of {
    int64_t file;   /* a descriptor opened with O_DIRECT, or -1: they are in memory */
    int64_t base;   /* of row 0: offset in the file, or address */
    int64_t stride; /* bytes from one row to the next */
    int64_t n_rows;
    int64_t end; /* byte of the file after the last that is needed of it */
};

struct reader {
    aio_context_t queue;     /* 0: there is none to be had, and reads are made one by one */
    char *buffer;            /* room for each read under way, or NULL */
    struct reading *reading; /* that was begun and not finished, or NULL */
};

struct wanted {
    int64_t row;
    uint64_t index; /* among what was asked for */
    int64_t begin;  /* offset in the file */
};

struct piece {
    int file;
    int64_t offset, nbytes;
    int64_t needed; /* bytes without which the read has failed; the file may end behind them */
    int64_t tensor;
    uint64_t first, last; /* of the rows that are wanted: those that it has a part of are among these */
};

struct pieces {
    struct piece *all;
    uint64_t n, room;
};

struct reader *jasper_open_reader(void)
{
    struct reader *reader = calloc(1, sizeof *reader);
    if (reader && syscall(SYS_io_setup, DEPTH, &reader->queue) != 0)
        reader->queue = 0;
    return reader;
}

int64_t jasper_finish_read(struct reader *reader);

void jasper_close_reader(struct reader *reader)
{
    if (!reader)
        return;
    jasper_finish_read(reader);
    if (reader->queue)
        syscall(SYS_io_destroy, reader->queue);
    if (reader->buffer)
        munmap(reader->buffer, BUFFER_NBYTES);
    free(reader);
}

/* In huge pages if there are some: the kernel looks up each page that it reads into. */
static int make_buffer(struct reader *reader)
{
    if (reader->buffer)
        return 1;
    char *found = mmap(NULL, BUFFER_NBYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED)
        return 0;
    madvise(found, BUFFER_NBYTES, MADV_HUGEPAGE);
    /* Pages that the disk writes into must not become shared with a child meanwhile: see fork in open(2), O_DIRECT. */
    madvise(found, BUFFER_NBYTES, MADV_DONTFORK);
    reader->buffer = found;
    return 1;
}

static int by_row(const void *a, const void *b)
{
    const int64_t one = ((const struct wanted *)a)->row, other = ((const struct wanted *)b)->row;
    return (one > other) - (one < other);
}

/* Cut a run into pieces that are read at a time. */
static int add_run(struct pieces *pieces, struct piece run, const struct wanted *rows, int64_t row_nbytes)
{
    while (run.nbytes > 0) {
        if (pieces->n == pieces->room) {
            const uint64_t room = pieces->room ? 2 * pieces->room : 256;
            struct piece *all = realloc(pieces->all, room * sizeof *all);
            if (!all)
                return 0;
            pieces->all = all, pieces->room = room;
        }
        struct piece piece = run;
        if (piece.nbytes > READ_NBYTES)
            piece.nbytes = READ_NBYTES;
        if (piece.needed > piece.nbytes)
            piece.needed = piece.nbytes;
        pieces->all[pieces->n++] = piece;
        run.offset += piece.nbytes, run.nbytes -= piece.nbytes, run.needed -= piece.needed;
        while (run.first < run.last && rows[run.first].begin + row_nbytes <= run.offset)
            run.first++;
    }
    return 1;
}

/* What some rows of a tensor are read by: rows[start] to rows[start + n - 1], which are put in order. */
static int plan(const struct rows_of *from, int64_t tensor, struct wanted *rows, uint64_t start, uint64_t n,
                int64_t row_nbytes, int64_t gap, struct pieces *pieces)
{
    const uint64_t end = start + n;
    int sorted = 1;
    for (uint64_t i = start + 1; i < end && sorted; i++)
        sorted = rows[i - 1].row <= rows[i].row;
    if (!sorted)
        qsort(rows + start, n, sizeof *rows, by_row);
    int64_t first = 0, last = -1;
    uint64_t first_row = start;
    for (uint64_t i = start; i <= end; i++) {
        int64_t page = 0;
        if (i < end) {
            rows[i].begin = from->base + rows[i].row * from->stride;
            page = rows[i].begin / PAGE * PAGE;
        }
        if (last >= 0 && (i == end || page > last + gap)) {
            const int64_t needed = (last < from->end ? last : from->end) - first;
            const struct piece run = {(int)from->file, first, last - first, needed, tensor, first_row, i};
            if (!add_run(pieces, run, rows, row_nbytes))
                return 0;
            last = -1;
        }
        if (i == end)
            break;
        if (last < 0)
            first = page, first_row = i;
        const int64_t stop = (rows[i].begin + row_nbytes + PAGE - 1) / PAGE * PAGE;
        if (stop > last)
            last = stop;
    }
    return 1;
}

/* What was asked for; see jasper_begin_read. */
struct request {
    const struct rows_of *tensors;
    uint64_t n_tensors;
    int64_t row_nbytes, gap;
    const int64_t *which, *rows;
    uint64_t n;
    int64_t zeros;
    char *target;
    int64_t *addresses;
};

/* What there is to read, and what of it is done. */
struct reading {
    struct side_work side;
    int aside; /* whether a helper has it */
    struct request request;
    int64_t failed; /* as jasper_finish_read returns it; if it is not 0, no more are handed over */
    struct wanted *rows; /* NULL before it is planned */
    struct pieces pieces;
    uint64_t next; /* the first of them that was not handed over */
    aio_context_t queue;
    char *buffer;
    struct iocb blocks[DEPTH]; /* each reads into its own part of the buffer */
    unsigned unused[DEPTH], free_blocks, under_way;
};

/* Read what a read in the queue left over; an interrupted or a short one. Returns whether all that is needed is there. */
static int finish(const struct piece *piece, char *buffer, int64_t done)
{
    while (done < piece->needed) {
        const ssize_t got =
            pread(piece->file, buffer + done, (size_t)(piece->nbytes - done), (off_t)(piece->offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return 0;
        done += got;
    }
    return 1;
}

/* Copy what a piece has of the rows. */
static void copy(const struct reading *reading, const struct piece *piece, const char *buffer)
{
    const int64_t until = piece->offset + piece->nbytes, row_nbytes = reading->request.row_nbytes;
    for (uint64_t i = piece->first; i < piece->last && reading->rows[i].begin < until; i++) {
        const int64_t begin = reading->rows[i].begin, end = begin + row_nbytes;
        const int64_t from = begin > piece->offset ? begin : piece->offset, to = end < until ? end : until;
        char *row = reading->request.target + (int64_t)i * row_nbytes;
        memcpy(row + (from - begin), buffer + (from - piece->offset), (size_t)(to - from));
    }
}

static void take_in(struct reading *reading, const struct piece *piece, char *buffer, int64_t done)
{
    if (finish(piece, buffer, done))
        copy(reading, piece, buffer);
    else if (!reading->failed)
        reading->failed = 3 * piece->tensor + 2;
}

static char *buffer_of(const struct reading *reading, unsigned block)
{
    return reading->buffer + (size_t)block * READ_NBYTES;
}

/* Take in what has come; waits until so many have, without end if that is not 0. */
static void reap(struct reading *reading, long least, unsigned most)
{
    struct io_event events[DEPTH];
    struct timespec now = {0};
    const long came = syscall(SYS_io_getevents, reading->queue, least, (long)most, events, least ? NULL : &now);
    for (long k = 0; k < came; k++) {
        const unsigned block = (unsigned)((struct iocb *)(uintptr_t)events[k].obj - reading->blocks);
        const int64_t done = events[k].res > 0 ? events[k].res : 0;
        take_in(reading, &reading->pieces.all[events[k].data], buffer_of(reading, block), done);
        reading->unused[reading->free_blocks++] = block;
        reading->under_way--;
    }
}

/* Hand over some reads, as far as the queue has room. */
static void hand_over(struct reading *reading, unsigned most)
{
    struct iocb *wanted[DEPTH];
    unsigned count = 0;
    for (; count < most && count < reading->free_blocks && reading->next + count < reading->pieces.n; count++) {
        const struct piece *piece = &reading->pieces.all[reading->next + count];
        const unsigned number = reading->unused[reading->free_blocks - 1 - count];
        struct iocb *block = wanted[count] = &reading->blocks[number];
        memset(block, 0, sizeof *block);
        block->aio_lio_opcode = IOCB_CMD_PREAD;
        block->aio_fildes = (uint32_t)piece->file;
        block->aio_buf = (uint64_t)(uintptr_t)buffer_of(reading, number);
        block->aio_nbytes = (uint64_t)piece->nbytes;
        block->aio_offset = piece->offset;
        block->aio_data = reading->next + count;
    }
    const long taken = count ? syscall(SYS_io_submit, reading->queue, (long)count, wanted) : 0;
    if (taken <= 0)
        return;
    reading->free_blocks -= (unsigned)taken, reading->under_way += (unsigned)taken, reading->next += (uint64_t)taken;
}

/* Find out what to read, and where each row will be. Returns as jasper_finish_read. */
static int64_t make_plan(struct reading *reading)
{
    const struct request *request = &reading->request;
    struct wanted *wanted = reading->rows = malloc((request->n + 1) * sizeof *wanted);
    if (!wanted)
        return NO_MEMORY;
    for (uint64_t i = 0; i < request->n; i++)
        request->addresses[i] = request->zeros;
    uint64_t count = 0;
    for (uint64_t t = 0; t < request->n_tensors; t++) {
        const struct rows_of *from = &request->tensors[t];
        const uint64_t start = count;
        for (uint64_t i = 0; i < request->n; i++) {
            const int64_t row = request->rows[i];
            if (request->which[i] != (int64_t)t)
                continue;
            if (row < 0 || row >= from->n_rows)
                return (int64_t)(3 * t + 1);
            if (from->file < 0)
                request->addresses[i] = from->base + row * from->stride;
            else
                wanted[count++] = (struct wanted){row, i, 0};
        }
        if (!plan(from, (int64_t)t, wanted, start, count - start, request->row_nbytes, request->gap, &reading->pieces))
            return NO_MEMORY;
    }
    for (uint64_t i = 0; i < count; i++)
        request->addresses[wanted[i].index] = (int64_t)(intptr_t)request->target + (int64_t)i * request->row_nbytes;
    return 0;
}

/* Go on with it, with so many reads at most. Waits for some, if `least` is not 0. */
static int go_on(struct reading *reading, long least, unsigned most)
{
    if (!reading->rows && !reading->failed)
        reading->failed = make_plan(reading);
    if (reading->under_way)
        reap(reading, least, most);
    if (reading->next < reading->pieces.n && !reading->failed) {
        hand_over(reading, most);
        if (!reading->under_way)
            /* No queue, or it takes nothing: then without. */
            take_in(reading, &reading->pieces.all[reading->next++], reading->buffer, 0);
    }
    if (reading->next < reading->pieces.n && !reading->failed)
        return BUSY;
    return reading->under_way ? ENDING : FINISHED;
}

static int step(struct side_work *side)
{
    return go_on((struct reading *)side, 0, STEP_READS);
}

static void read_alone(struct reading *reading)
{
    for (long least = 0; go_on(reading, least, DEPTH) != FINISHED;) {
        /* Several at a time: each round of calls tells the disk once, however many reads it hands over. */
        const long under_way = reading->under_way;
        least = under_way > DEPTH / 2 ? under_way - DEPTH / 2 : 1;
    }
}

/* Begin to bring rows into memory. All that is named here has to stay until it is finished.
 *
 * which:     tensor number of each, [n]; less than 0 is the row at address `zeros`.
 * rows:      row of each, [n].
 * gap:       bytes between the pages of two rows that are read along.
 * target:    room for those that are in files, one after the other.
 * addresses: of each row, [n], when it is finished.
 *
 * Returns whether there was memory for it. */
int jasper_begin_read(struct reader *reader, const struct rows_of *tensors, uint64_t n_tensors, int64_t row_nbytes,
                      int64_t gap, const int64_t *which, const int64_t *rows, uint64_t n, int64_t zeros, char *target,
                      int64_t *addresses)
{
    struct reading *reading = reader->reading ? NULL : calloc(1, sizeof *reading);
    if (!reading || !make_buffer(reader)) {
        free(reading);
        return 0;
    }
    reading->side.step = step;
    reading->request =
        (struct request){tensors, n_tensors, row_nbytes, gap, which, rows, n, zeros, target, addresses};
    reading->queue = reader->queue;
    reading->buffer = reader->buffer;
    for (; reader->queue && reading->free_blocks < DEPTH; reading->free_blocks++)
        reading->unused[reading->free_blocks] = reading->free_blocks;
    reader->reading = reading;
    reading->aside = jasper_begin_aside(&reading->side);
    return 1;
}

/* Wait for what was begun. Returns 0; or 3 t + 1: tensor t does not have a row, 3 t + 2: tensor t could not be read; or
 * -1: no memory, -2: it was begun by the process that this one was forked from. */
int64_t jasper_finish_read(struct reader *reader)
{
    struct reading *reading = reader->reading;
    if (!reading)
        return 0;
    reader->reading = NULL;
    if (!reading->aside)
        read_alone(reading);
    else if (!jasper_await_aside(&reading->side))
        return ANOTHER_PROCESS; /* a helper was at it, and left it in any state: nothing of it can be given back */
    const int64_t failed = reading->failed;
    free(reading->pieces.all);
    free(reading->rows);
    free(reading);
    return failed;
}
