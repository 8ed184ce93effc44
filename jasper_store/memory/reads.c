/* Brings scattered rows of files into memory: many reads at once, past the page cache, without the interpreter.
 *
 * A read costs a disk as much as some more pages of one, so rows that lie near each other are read in one run with what
 * is between them, into a buffer, and copied out of it. Measured figures stand in docs/notes-paging.md.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    PAGE = 4096,
    DEPTH = 32,              /* reads under way at a time */
    RUN_NBYTES = 128 << 10,  /* of one read, at most */
    HUGE_PAGE = 2 << 20,
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
    aio_context_t queue; /* 0: there is none to be had, and reads are made one by one */
    char *buffer;
    uint64_t size;
};

struct range {
    int file;
    int64_t offset, nbytes;
    int64_t needed; /* bytes without which the read has failed; the file may end behind them */
    int64_t place;  /* in the buffer */
    int64_t tensor;
};

struct wanted {
    int64_t row;
    uint64_t index; /* among what was asked for */
    int64_t place;  /* in the buffer */
};

struct ranges {
    struct range *all;
    uint64_t n, room;
    int64_t nbytes;
};

struct reader *jasper_open_reader(void)
{
    struct reader *reader = calloc(1, sizeof *reader);
    if (reader && syscall(SYS_io_setup, DEPTH, &reader->queue) != 0)
        reader->queue = 0;
    return reader;
}

void jasper_close_reader(struct reader *reader)
{
    if (!reader)
        return;
    if (reader->queue)
        syscall(SYS_io_destroy, reader->queue);
    if (reader->buffer)
        munmap(reader->buffer, reader->size);
    free(reader);
}

/* A buffer of so many bytes, in huge pages if there are some: the kernel looks up each page that it reads into. */
static int make_room(struct reader *reader, uint64_t nbytes)
{
    if (nbytes <= reader->size)
        return 1;
    const uint64_t size = (nbytes + nbytes / 4 + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    char *found = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED)
        return 0;
    madvise(found, size, MADV_HUGEPAGE);
    if (reader->buffer)
        munmap(reader->buffer, reader->size);
    reader->buffer = found, reader->size = size;
    return 1;
}

static int by_row(const void *a, const void *b)
{
    const int64_t one = ((const struct wanted *)a)->row, other = ((const struct wanted *)b)->row;
    return (one > other) - (one < other);
}

static int add_range(struct ranges *ranges, struct range range)
{
    while (range.nbytes > 0) {
        if (ranges->n == ranges->room) {
            const uint64_t room = ranges->room ? 2 * ranges->room : 256;
            struct range *all = realloc(ranges->all, room * sizeof *all);
            if (!all)
                return 0;
            ranges->all = all, ranges->room = room;
        }
        struct range piece = range;
        if (piece.nbytes > RUN_NBYTES)
            piece.nbytes = RUN_NBYTES;
        if (piece.needed > piece.nbytes)
            piece.needed = piece.nbytes;
        piece.place = ranges->nbytes;
        ranges->all[ranges->n++] = piece;
        ranges->nbytes += piece.nbytes;
        range.offset += piece.nbytes, range.nbytes -= piece.nbytes, range.needed -= piece.needed;
    }
    return 1;
}

/* The runs that some rows of a tensor are read by, and where in the buffer each row is then. */
static int plan(const struct rows_of *from, int64_t tensor, struct wanted *rows, uint64_t n, int64_t row_nbytes,
                int64_t gap, struct ranges *ranges)
{
    int sorted = 1;
    for (uint64_t i = 1; i < n && sorted; i++)
        sorted = rows[i - 1].row <= rows[i].row;
    if (!sorted)
        qsort(rows, n, sizeof *rows, by_row);
    int64_t first = 0, last = -1, place = 0;
    for (uint64_t i = 0; i <= n; i++) {
        int64_t begin = 0, page = 0;
        if (i < n) {
            begin = from->base + rows[i].row * from->stride;
            page = begin / PAGE * PAGE;
        }
        if (last >= 0 && (i == n || page > last + gap)) {
            const int64_t needed = (last < from->end ? last : from->end) - first;
            const struct range run = {(int)from->file, first, last - first, needed, 0, tensor};
            if (!add_range(ranges, run))
                return 0;
            last = -1;
        }
        if (i == n)
            break;
        if (last < 0)
            first = page, place = ranges->nbytes;
        const int64_t stop = (begin + row_nbytes + PAGE - 1) / PAGE * PAGE;
        if (stop > last)
            last = stop;
        rows[i].place = place + begin - first;
    }
    return 1;
}

/* Read what a read in the queue left over; an interrupted or a short one. Returns whether all that is needed is there. */
static int finish(const struct range *range, char *buffer, int64_t done)
{
    while (done < range->needed) {
        const ssize_t got = pread(range->file, buffer + range->place + done, (size_t)(range->nbytes - done),
                                  (off_t)(range->offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return 0;
        done += got;
    }
    return 1;
}

/* Returns NULL, or a range that could not be read. All reads are over when it returns. */
static const struct range *read_all(aio_context_t queue, const struct range *ranges, uint64_t n, char *buffer)
{
    struct iocb blocks[DEPTH];
    struct io_event events[DEPTH];
    unsigned unused[DEPTH], free_blocks = 0, under_way = 0;
    uint64_t next = 0;
    const struct range *bad = NULL;
    while (queue && free_blocks < DEPTH)
        unused[free_blocks] = free_blocks, free_blocks++;
    while ((next < n && !bad) || under_way) {
        struct iocb *wanted[DEPTH];
        unsigned count = 0;
        for (; count < free_blocks && next + count < n && !bad; count++) {
            const struct range *range = &ranges[next + count];
            struct iocb *block = wanted[count] = &blocks[unused[free_blocks - 1 - count]];
            memset(block, 0, sizeof *block);
            block->aio_lio_opcode = IOCB_CMD_PREAD;
            block->aio_fildes = (uint32_t)range->file;
            block->aio_buf = (uint64_t)(uintptr_t)(buffer + range->place);
            block->aio_nbytes = (uint64_t)range->nbytes;
            block->aio_offset = range->offset;
            block->aio_data = next + count;
        }
        long taken = count ? syscall(SYS_io_submit, queue, (long)count, wanted) : 0;
        if (taken < 0)
            taken = 0;
        free_blocks -= (unsigned)taken, under_way += (unsigned)taken, next += (uint64_t)taken;
        if (!under_way) {
            /* No queue, or it takes nothing: then without. */
            if (next < n && !bad && !finish(&ranges[next], buffer, 0))
                bad = &ranges[next];
            next++;
            continue;
        }
        /* Several at a time: each round of calls tells the disk once, however many reads it hands over. */
        const long least = under_way > DEPTH / 2 ? (long)under_way - DEPTH / 2 : 1;
        const long came = syscall(SYS_io_getevents, queue, least, (long)DEPTH, events, NULL);
        for (long k = 0; k < came; k++) {
            const struct range *range = &ranges[events[k].data];
            if (!finish(range, buffer, events[k].res > 0 ? events[k].res : 0) && !bad)
                bad = range;
            unused[free_blocks++] = (unsigned)((struct iocb *)(uintptr_t)events[k].obj - blocks);
            under_way--;
        }
    }
    return bad;
}

/* Have rows in memory.
 *
 * which:     tensor number of each, [n]; less than 0 is the row at address `zeros`.
 * rows:      row of each, [n].
 * gap:       bytes between the pages of two rows that are read along.
 * target:    room for those that are read, one after the other.
 * addresses: of each row, [n], when this returns 0.
 *
 * Returns 0; or 3 t + 1: a row that tensor t does not have, 3 t + 2: tensor t could not be read; or -1: no memory. */
int64_t jasper_read_rows(struct reader *reader, const struct rows_of *tensors, uint64_t n_tensors, int64_t row_nbytes,
                         int64_t gap, const int64_t *which, const int64_t *rows, uint64_t n, int64_t zeros, char *target,
                         int64_t *addresses)
{
    struct wanted *wanted = malloc((n + 1) * sizeof *wanted);
    struct ranges ranges = {0};
    uint64_t count = 0;
    int64_t failed = wanted ? 0 : -1;
    for (uint64_t i = 0; i < n && !failed; i++)
        addresses[i] = zeros;
    for (uint64_t t = 0; t < n_tensors && !failed; t++) {
        const struct rows_of *from = &tensors[t];
        const uint64_t start = count;
        for (uint64_t i = 0; i < n && !failed; i++) {
            if (which[i] != (int64_t)t)
                continue;
            if (rows[i] < 0 || rows[i] >= from->n_rows)
                failed = (int64_t)(3 * t + 1);
            else if (from->file < 0)
                addresses[i] = from->base + rows[i] * from->stride;
            else
                wanted[count++] = (struct wanted){rows[i], i, 0};
        }
        if (!failed && count > start &&
            !plan(from, (int64_t)t, wanted + start, count - start, row_nbytes, gap, &ranges))
            failed = -1;
    }
    if (!failed && !make_room(reader, (uint64_t)ranges.nbytes))
        failed = -1;
    if (!failed) {
        const struct range *bad = read_all(reader->queue, ranges.all, ranges.n, reader->buffer);
        failed = bad ? 3 * bad->tensor + 2 : 0;
    }
    for (uint64_t i = 0; i < count && !failed; i++, target += row_nbytes) {
        memcpy(target, reader->buffer + wanted[i].place, (size_t)row_nbytes);
        addresses[wanted[i].index] = (int64_t)(intptr_t)target;
    }
    free(ranges.all);
    free(wanted);
    return failed;
}
