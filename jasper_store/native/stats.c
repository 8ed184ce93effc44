/* What the system says of many files: of ten thousand, a call each from Python takes most of the time of an opening. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>

/* Size, modification time in nanoseconds, inode and device of `count` files: `found` has a row of `count` numbers for each.
 * `names` are one after another, each with its zero byte, relative to `directory`; links are followed. Returns how many were
 * found before one was not there or could not be reached. */
int64_t jasper_stat_files(int directory, const char *names, int64_t count, int64_t *found)
{
    for (int64_t i = 0; i < count; i++) {
        struct stat facts;
        if (fstatat(directory, names, &facts, 0))
            return i;
        found[i] = facts.st_size;
        found[count + i] = facts.st_mtim.tv_sec * INT64_C(1000000000) + facts.st_mtim.tv_nsec;
        found[2 * count + i] = (int64_t)facts.st_ino;
        found[3 * count + i] = (int64_t)facts.st_dev;
        names += strlen(names) + 1;
    }
    return count;
}
