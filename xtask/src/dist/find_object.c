// The compiler's unwinder, linked into the release, asks for `_dl_find_object` of glibc 2.35 where
// it was itself built beside a glibc that has it. This is that function over `dl_iterate_phdr`, which
// every glibc has. It is hidden: other libraries of the process keep glibc's own.
#define _GNU_SOURCE
#include <link.h>
#include <stddef.h>

// As glibc's manual lays it out for x86-64.
struct found {
    unsigned long long flags;
    void *start;
    void *end;
    struct link_map *map;
    void *eh_frame;
    unsigned long long reserved[7];
};

struct search {
    ElfW(Addr) address;
    struct found *found;
};

// 1 for the object that has the address and unwinding tables, -1 for one that has none.
static int look(struct dl_phdr_info *info, size_t size, void *data) {
    (void)size;
    struct search *search = data;
    ElfW(Addr) start = ~(ElfW(Addr))0, end = 0, eh_frame = 0;
    int inside = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &info->dlpi_phdr[i];
        ElfW(Addr) from = info->dlpi_addr + part->p_vaddr;
        if (part->p_type == PT_LOAD) {
            inside |= search->address - from < part->p_memsz;
            start = from < start ? from : start;
            end = from + part->p_memsz > end ? from + part->p_memsz : end;
        } else if (part->p_type == PT_GNU_EH_FRAME) {
            eh_frame = from;
        }
    }
    if (!inside)
        return 0;
    if (!eh_frame)
        return -1;
    *search->found = (struct found){
        .start = (void *)start, .end = (void *)end, .eh_frame = (void *)eh_frame};
    return 1;
}

// Newer headers declare that name with a type of their own.
__attribute__((visibility("hidden"))) int find_object(void *, struct found *) __asm__("_dl_find_object");

int find_object(void *address, struct found *found) {
    struct search search = {(ElfW(Addr))address, found};
    return dl_iterate_phdr(look, &search) == 1 ? 0 : -1;
}
