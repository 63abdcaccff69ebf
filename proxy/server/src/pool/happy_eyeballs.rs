//! Happy Eyeballs (RFC 8305 section 5): several addresses of one endpoint, the first connection wins.

use std::future::Future;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

/// How long an attempt has the stage for itself; Envoy's figure, and within the RFC's bounds.
pub(super) async fn attempt_delay() {
    tokio::time::sleep(Duration::from_millis(300)).await;
}

/// Begins one attempt after the other, the next when one has failed or has not come to an end after a delay, and gives the
/// first success; when there is none, the last failure.
///
/// Dropping the future drops the attempts that are under way.
pub(super) async fn first<T, E, F>(
    mut attempts: impl Iterator<Item = F>,
    delay: impl AsyncFn(),
    none: E,
) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let mut running: Vec<Pin<Box<F>>> = Vec::new();
    let mut last = none;
    let mut more = true;
    loop {
        match attempts.next().filter(|_| more) {
            Some(attempt) => running.push(Box::pin(attempt)),
            None => more = false,
        }
        if running.is_empty() {
            return Err(last);
        }
        let ended = tokio::select! {
            biased;
            ended = any(&mut running) => Some(ended),
            () = delay(), if more => None,
        };
        match ended {
            Some(Ok(made)) => return Ok(made),
            Some(Err(error)) => last = error,
            None => {}
        }
    }
}

/// The result of the first that ends, which leaves the list.
async fn any<T, E, F>(running: &mut Vec<Pin<Box<F>>>) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    std::future::poll_fn(|task| {
        for index in 0..running.len() {
            if let Poll::Ready(ended) = running[index].as_mut().poll(task) {
                drop(running.swap_remove(index));
                return Poll::Ready(ended);
            }
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::first;
    use std::cell::Cell;
    use std::future::{pending, ready};

    /// What becomes of an attempt: after so many polls it succeeds or fails, or it never ends.
    #[derive(Clone, Copy, Debug)]
    enum Attempt {
        Succeeds(usize),
        Fails(usize),
        Hangs,
    }
    use Attempt::{Fails, Hangs, Succeeds};

    /// Which attempt was the last word, and how many were begun. With `impatient` every delay is over at once,
    /// otherwise none ever is.
    async fn race(script: &[Attempt], impatient: bool) -> (Result<usize, usize>, usize) {
        let begun = Cell::new(0);
        let attempts = script.iter().enumerate().map(|(index, attempt)| {
            let begun = &begun;
            async move {
                begun.set(begun.get() + 1);
                let (Succeeds(polls) | Fails(polls)) = *attempt else { return pending().await };
                for _ in 0..polls {
                    tokio::task::yield_now().await;
                }
                if matches!(attempt, Succeeds(_)) { Ok(index) } else { Err(index) }
            }
        });
        let delay = async || if impatient { ready(()).await } else { pending().await };
        (first(attempts, delay, usize::MAX).await, begun.get())
    }

    #[tokio::test]
    async fn the_first_connection_wins() {
        for (script, impatient, outcome) in [
            (&[][..], false, (Err(usize::MAX), 0)),
            (&[Succeeds(3), Succeeds(0)], false, (Ok(0), 1)),
            // A failure lets the next begin at once.
            (&[Fails(3), Succeeds(0)], false, (Ok(1), 2)),
            // So does silence, after the delay; the silent one may still win.
            (&[Hangs, Hangs, Succeeds(0), Succeeds(0)], true, (Ok(2), 3)),
            (&[Succeeds(2), Hangs], true, (Ok(0), 2)),
            // The last failure is the one that is told of.
            (&[Fails(9), Fails(0), Fails(2)], true, (Err(0), 3)),
        ] {
            assert_eq!(race(script, impatient).await, outcome, "{script:?}");
        }
    }
}
