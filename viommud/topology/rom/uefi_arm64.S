/*
 * A UEFI driver for 64-bit Arm: gives the firmware one more ACPI table, which follows the code.
 *
 * Offsets are those of the UEFI specification: EFI_SYSTEM_TABLE.BootServices, EFI_BOOT_SERVICES.LocateProtocol, and
 * EFI_ACPI_TABLE_PROTOCOL.InstallAcpiTable, which is the first member.  The code runs wherever it is loaded.
 */
    .set BOOT_SERVICES, 96
    .set LOCATE_PROTOCOL, 320
    .set TABLE_LENGTH, 4            /* in every ACPI table's header */

    .text
    /* x0: the image's handle; x1: EFI_SYSTEM_TABLE.  x0 afterwards: EFI_STATUS. */
    stp     x29, x30, [sp, #-32]!
    mov     x29, sp
    ldr     x8, [x1, #BOOT_SERVICES]
    ldr     x8, [x8, #LOCATE_PROTOCOL]
    adr     x0, protocol
    mov     x1, xzr
    add     x2, sp, #16             /* where the interface goes */
    blr     x8
    cbnz    x0, done                /* no such protocol: the machine has no ACPI */
    ldr     x0, [sp, #16]
    ldr     x8, [x0]
    adr     x1, table
    ldr     w2, [x1, #TABLE_LENGTH]
    add     x3, sp, #24             /* where the table's key goes */
    blr     x8
done:
    ldp     x29, x30, [sp], #32
    ret

    .balign 8
protocol:                           /* EFI_ACPI_TABLE_PROTOCOL_GUID */
    .long   0xffe06bdd
    .short  0x6107, 0x46a6
    .byte   0x7b, 0xb2, 0x5a, 0x9c, 0x7e, 0xc5, 0x27, 0x5c
table:
