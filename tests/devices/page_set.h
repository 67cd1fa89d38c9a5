/* A set of page numbers that only grows: open addressing, for the account of touched pages. */
#ifndef PAGE_SET_H
#define PAGE_SET_H

#include <stddef.h>
#include <stdint.h>

struct page_set {
    uint64_t *slots; /* page + 1; 0 is empty */
    size_t capacity; /* a power of two, or 0 */
    size_t count;
};

/* Adds a page if it is new. Out of memory ends the program: an account with holes would be a wrong number. */
void page_set_add(struct page_set *set, uint64_t page);
void page_set_free(struct page_set *set);

#endif
