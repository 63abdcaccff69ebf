//! The allocator.

/// Returns freed memory to the kernel. Compiling a large configuration and rendering it for the admin interface free many
/// times what they keep, and the C library holds on to that. It costs milliseconds: once after start-up, and when a
/// rendering thread ends.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "malloc_trim has no safe wrapper")]
pub fn give_back() {
    // SAFETY: malloc_trim takes no pointer, and is safe to call from any thread at any time.
    unsafe { libc::malloc_trim(0) };
}

/// Other C libraries give memory back by themselves.
#[cfg(not(target_env = "gnu"))]
pub fn give_back() {}
