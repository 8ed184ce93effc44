/* The interface of the library, as library.py knows it. */
#ifndef LIBRARY_H
#define LIBRARY_H

#include <stdint.h>

#include "parts.h"
#include "processor.h"

struct gather {
    const char *source;
    uint64_t n_rows, row_nbytes, stride;
    const int64_t *rows;
    uint64_t rows_step, n;
    char *target;
    int64_t widen;
    uint64_t stage;
};

struct single_gather {
    struct gather gather;
    uint64_t threads;
};

struct row_layout {
    int64_t file, base, stride, n_rows, end;
};

enum { NO_MEMORY = -1, FORKED = -2, ROW_MISSING = 1, FILE_ENDS = 2, UNREADABLE = 3 };

struct reader;

int64_t jasper_gather(const struct gather *gathers, uint64_t n_gathers, unsigned threads);
int64_t jasper_gather_begin(int64_t *begun, const struct gather *gathers, uint64_t n_gathers, unsigned threads);
void jasper_gather_finish(int64_t *begun);
void jasper_gather_cancel(int64_t *begun);
int64_t jasper_gather_one(const struct single_gather *one);
int64_t jasper_locate_rows(const struct parts *parts, int64_t unmapped, const int64_t *rows, int64_t rows_step, uint64_t n,
                           int64_t *addresses);
void jasper_parts_of_rows(const struct parts *parts, const int64_t *rows, int64_t rows_step, uint64_t n, int64_t *found);
struct reader *jasper_open_reader(void);
void jasper_close_reader(struct reader *reader);
int jasper_begin_read(struct reader *reader, const struct row_layout *tensors, uint64_t n_tensors, int64_t row_nbytes,
                      int64_t max_gap, const int64_t *tensor_of, const int64_t *rows, uint64_t n, int64_t zero_row,
                      char *target, int64_t *addresses);
int64_t jasper_finish_read(struct reader *reader);

#endif
