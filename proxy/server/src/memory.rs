//! The allocator.

/// Returns freed memory to the kernel. Compiling a large configuration frees many times what it keeps, and the C library
/// holds on to that; once after start-up is enough, so it costs milliseconds in the life of the process.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "malloc_trim has no safe wrapper")]
pub fn give_back() {
    // SAFETY: malloc_trim takes no pointer, and is safe to call from any thread at any time.
    unsafe { libc::malloc_trim(0) };
}

/// Other C libraries give memory back by themselves.
#[cfg(not(target_env = "gnu"))]
pub fn give_back() {}
