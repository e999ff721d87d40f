//! How many replicas each expert gets, before any search.

/// What each of `count` replicas carries, to the nearest integer.
#[inline(always)]
pub(crate) fn share(weight: i32, count: u32) -> i32 {
    // Most have one, and a division takes long.
    if count == 1 {
        return weight;
    }
    ((weight as u32 + count / 2) / count) as i32
}

/// Gives each expert one slot and each spare slot to the largest share, ties to the lowest index;
/// no expert gets more than `most`. Weights are in descending order.
///
/// Only the first experts ever get more, since the largest share is either that of the first
/// expert not replicated yet or that of one replicated before.
pub(crate) fn greedy(
    weight: &[i32],
    num_slots: usize,
    most: u32,
    count: &mut Vec<u32>,
    head: &mut Vec<(i32, u32)>,
) {
    count.clear();
    count.resize(weight.len(), 1);
    // Experts with further replicas that may have more, largest share last.
    head.clear();
    let mut next = 0;
    for _ in weight.len()..num_slots {
        let of_head = head.last().map_or(-1, |&(share, _)| share);
        let expert = match weight.get(next) {
            _ if most < 2 => return,
            Some(&weight) if weight >= of_head => {
                next += 1;
                next - 1
            }
            _ => match head.pop() {
                Some((_, expert)) => expert as usize,
                None => return,
            },
        };
        count[expert] += 1;
        if count[expert] < most {
            let item = (share(weight[expert], count[expert]), expert as u32);
            let place = head.partition_point(|&other| other < item);
            head.insert(place, item);
        }
    }
}

/// Lists the share and the number of each expert, largest share first, ties to the lowest number.
/// Weights are in descending order, so that only the replicated ones need sorting.
pub(crate) fn list(
    weight: &[i32],
    count: &[u32],
    replicated: &mut Vec<(i32, u32)>,
    items: &mut Vec<(i32, u32)>,
) {
    replicated.clear();
    for (expert, (&weight, &count)) in weight.iter().zip(count).enumerate() {
        if count > 1 {
            replicated.push((share(weight, count), expert as u32));
        }
    }
    replicated.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    items.clear();
    let mut replicated = replicated.iter().copied().peekable();
    for (expert, (&weight, &count)) in weight.iter().zip(count).enumerate() {
        if count == 1 {
            let before = |item: &(i32, u32)| item.0 > weight;
            while let Some(item) = replicated.next_if(before) {
                items.push(item);
            }
            items.push((weight, expert as u32));
        }
    }
    items.extend(replicated);
}
