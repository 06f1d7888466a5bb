//! int32 arrays whose memory is used again.
//!
//! An order of a long request takes megabytes and lives as long as the request. Fresh pages cost several times the
//! writing, a fault each, so the memory of dropped arrays is kept, within a bound, for the next request's.

use std::collections::VecDeque;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use crate::error::LayoutError;

/// Most elements that are kept, 64 MiB.
const KEPT: usize = 1 << 24;

/// Arrays of fewer elements are the allocator's business.
const SMALL: usize = 1 << 14;

/// Memory to use again, oldest first.
static SHELF: Mutex<VecDeque<Vec<i32>>> = Mutex::new(VecDeque::new());

/// A fixed number of int32. Its memory goes to the next buffer of about that size.
pub struct Buffer(Vec<i32>);

impl Buffer {
    /// Unspecified elements, to be written by the caller.
    pub(crate) fn new(length: usize) -> Result<Self, LayoutError> {
        let mut array = if length < SMALL { None } else { take(length) }.unwrap_or_default();
        array.truncate(length);
        let missing = length - array.len();
        array.try_reserve_exact(missing).map_err(|_| LayoutError::Memory { elements: length })?;
        array.resize(length, 0);
        Ok(Self(array))
    }
}

impl Deref for Buffer {
    type Target = [i32];

    fn deref(&self) -> &[i32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [i32] {
        &mut self.0
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Buffer({} elements)", self.0.len())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if (SMALL..=KEPT).contains(&self.0.capacity()) {
            give(std::mem::take(&mut self.0));
        }
    }
}

/// The smallest kept array that holds `length` elements and is at most half empty with them.
fn take(length: usize) -> Option<Vec<i32>> {
    let mut shelf = SHELF.lock().unwrap_or_else(PoisonError::into_inner);
    let fits = |array: &Vec<i32>| (length..=2 * length).contains(&array.capacity());
    let best = (0..shelf.len()).filter(|&at| fits(&shelf[at])).min_by_key(|&at| shelf[at].capacity())?;
    shelf.remove(best)
}

/// Keeps an array in place of the oldest ones.
fn give(array: Vec<i32>) {
    let mut dropped = Vec::new();
    let mut shelf = SHELF.lock().unwrap_or_else(PoisonError::into_inner);
    let mut kept: usize = array.capacity() + shelf.iter().map(Vec::capacity).sum::<usize>();
    shelf.push_back(array);
    while kept > KEPT {
        let Some(oldest) = shelf.pop_front() else { break };
        kept -= oldest.capacity();
        dropped.push(oldest);
    }
    // Returning memory to the system takes longer than the lock should be held.
    drop(shelf);
}

/// What is left of a slice from which parts are taken off the front.
#[derive(Default)]
pub(crate) struct Rest<'a>(pub(crate) &'a mut [i32]);

impl<'a> Rest<'a> {
    pub(crate) fn take(&mut self, count: usize) -> &'a mut [i32] {
        let (head, tail) = std::mem::take(&mut self.0).split_at_mut(count);
        self.0 = tail;
        head
    }
}

#[cfg(test)]
mod tests {
    use super::{Buffer, KEPT, SHELF, SMALL};

    fn kept() -> usize {
        SHELF.lock().expect("no test panics under the lock").iter().map(Vec::capacity).sum()
    }

    /// One test, as the shelf is shared by all.
    #[test]
    fn memory_is_used_again_and_bounded() {
        let long = 4 * SMALL;
        let mut buffer = Buffer::new(long).expect("a little memory");
        assert_eq!(buffer.len(), long);
        buffer.fill(7);
        let memory = buffer.as_ptr();
        drop(buffer);
        let shorter = Buffer::new(long - 5).expect("a little memory");
        assert_eq!((shorter.as_ptr(), shorter.len()), (memory, long - 5));
        drop(shorter);
        let again = Buffer::new(long).expect("a little memory");
        assert_eq!((again.as_ptr(), again.len()), (memory, long));
        drop(again);

        let before = kept();
        drop(Buffer::new(SMALL - 1).expect("a little memory"));
        assert_eq!(kept(), before);
        assert!(Buffer::new(usize::MAX).is_err());

        let count = if cfg!(miri) { 2 } else { 2 * KEPT / (1 << 20) };
        drop((0..count).map(|_| Buffer::new(1 << 20).expect("a little memory")).collect::<Vec<_>>());
        assert!(kept() <= KEPT);
    }
}
