/*
 * An option ROM for a PC's BIOS: lists one more ACPI table, which is in the ROM itself, beside those of the machine.
 *
 * The BIOS calls it after it has put the machine's tables into memory (SeaBIOS src/post.c).  It makes a copy of the
 * XSDT in the ROM, which is in RAM by then, appends its own table, and lets the RSDP point to the copy.  If anything is
 * not as expected, it changes nothing.  The copy is made by INT 15h function 87h, since the XSDT is above 1 MiB.
 */
    .set XSDT, 0x200                /* of the ROM: room for the copy */
    .set XSDT_ROOM, 0x200
    .set TABLE, 0x400               /* of the ROM: the table to add */

    .set TABLE_LENGTH, 4            /* in every ACPI table's header */
    .set TABLE_CHECKSUM, 9
    .set TABLE_HEADER, 36
    .set RSDP_REVISION, 15
    .set RSDP_XSDT, 24
    .set RSDP_CHECKSUM, 32          /* of all its bytes */
    .set RSDP_SIZE, 36

    .set SOURCE, 0x10               /* in the table of segments for INT 15h */
    .set TARGET, 0x18

    .code16
    .text
    .byte   0x55, 0xaa, 0           /* the size is filled in with the table */
    jmp     init                    /* the BIOS calls this */
    .byte   0                       /* makes the sum of all bytes zero; filled in with the table */
    .org    0x40

init:
    pushal
    push    %ds
    push    %es
    cld
    push    %cs
    pop     %ds
    mov     $0xf000, %ax
    mov     %ax, %es
    xor     %di, %di
1:  mov     $signature, %si         /* es:di: the RSDP, somewhere in the BIOS's segment */
    mov     $4, %cx
    push    %di
    repe cmpsw
    pop     %di
    je      2f
    add     $16, %di
    jnz     1b
    jmp     done

2:  cmpb    $2, %es:RSDP_REVISION(%di)
    jb      done                    /* it has no XSDT */
    cmpl    $0, %es:RSDP_XSDT+4(%di)
    jne     done                    /* out of reach */
    mov     %es:RSDP_XSDT(%di), %ebx
    test    %ebx, %ebx
    jz      done
    xor     %edx, %edx
    mov     %cs, %dx
    shl     $4, %edx                /* where the ROM is */
    mov     $TABLE_HEADER/2, %cx
    call    copy
    jc      done
    mov     XSDT+TABLE_LENGTH, %ecx
    cmp     $TABLE_HEADER, %ecx
    jb      done
    cmp     $XSDT_ROOM-8, %ecx
    ja      done
    inc     %cx
    shr     $1, %cx
    call    copy
    jc      done

    mov     XSDT+TABLE_LENGTH, %cx
    mov     $XSDT, %si
    add     %cx, %si
    lea     TABLE(%edx), %eax
    mov     %eax, (%si)
    movl    $0, 4(%si)
    add     $8, %cx
    mov     %cx, XSDT+TABLE_LENGTH
    movb    $0, XSDT+TABLE_CHECKSUM
    mov     $XSDT, %si
    call    checksum
    mov     %al, XSDT+TABLE_CHECKSUM

    lea     XSDT(%edx), %eax
    mov     %eax, %es:RSDP_XSDT(%di)
    movb    $0, %es:RSDP_CHECKSUM(%di)
    mov     $RSDP_SIZE, %cx
    mov     %di, %si
    push    %es
    pop     %ds
    call    checksum
    mov     %al, %es:RSDP_CHECKSUM(%di)
done:
    pop     %es
    pop     %ds
    popal
    lretw

/* Copy %cx words from physical %ebx to the ROM's room for the XSDT; %edx is where the ROM is.  Carry: failed. */
copy:
    push    %es
    push    %cs
    pop     %es
    mov     $segments, %si
    mov     %ebx, %eax
    mov     %ax, SOURCE+2(%si)
    shr     $16, %eax
    mov     %al, SOURCE+4(%si)
    mov     %ah, SOURCE+7(%si)
    lea     XSDT(%edx), %eax
    mov     %ax, TARGET+2(%si)
    shr     $16, %eax
    mov     %al, TARGET+4(%si)
    mov     %ah, TARGET+7(%si)
    mov     $0x8700, %ax
    int     $0x15
    pop     %es
    ret

/* %al: what makes the sum of %cx bytes at %ds:%si zero. */
checksum:
    xor     %ax, %ax
1:  sub     (%si), %al
    inc     %si
    loop    1b
    ret

    .balign 4
signature:
    .ascii  "RSD PTR "
    .balign 8
segments:
    .skip   SOURCE                  /* the BIOS's own */
    .word   0xffff, 0               /* source: limit, base */
    .byte   0, 0x93, 0, 0           /* base, data to read and write, granularity, base */
    .word   0xffff, 0               /* target */
    .byte   0, 0x93, 0, 0
    .skip   0x10                    /* the BIOS's own */
