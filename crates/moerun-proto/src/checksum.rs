//! Checksums of requests and answers: what TCP's sixteen bits, a proxy or bad memory let through is found.
//!
//! XXH3-64 of one field after another, each seeded with the one before, the first with the numbers of the message: so
//! borders between fields count too, and nothing is copied together.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::v1;

/// Adds the checksum. What is changed later does not fit any more.
pub fn seal_request(request: &mut v1::ExecuteRequest) {
    request.checksum = Some(of_request(request));
}

/// Whether the checksum fits; a request without one is taken as it is.
pub fn request_is_intact(request: &v1::ExecuteRequest) -> bool {
    request.checksum.is_none_or(|checksum| checksum == of_request(request))
}

/// Adds the checksum. What is changed later does not fit any more.
pub fn seal_answer(answer: &mut v1::ExecuteResponse) {
    answer.checksum = Some(of_answer(answer));
}

/// Whether there is a checksum that fits: whoever asked with one wants one.
pub fn answer_is_intact(answer: &v1::ExecuteResponse) -> bool {
    answer.checksum == Some(of_answer(answer))
}

fn of_request(request: &v1::ExecuteRequest) -> u64 {
    let numbers = [
        request.request_id,
        request.layer.into(),
        request.rows.into(),
        request.hidden.into(),
        request.format as u64,
        request.deadline_micros.into(),
    ];
    let fields = [
        &request.hidden_states,
        &request.assignment_counts,
        &request.expert_ids,
        &request.routing_weights,
        &request.first_blocks,
        &request.end_blocks,
    ];
    chained(&numbers, fields.map(AsRef::as_ref))
}

fn of_answer(answer: &v1::ExecuteResponse) -> u64 {
    let numbers = [
        answer.request_id,
        answer.status as u64,
        answer.layer.into(),
        answer.expert.into(),
        answer.block.map_or(u64::MAX, u64::from),
        answer.queue_micros.into(),
        answer.compute_micros.into(),
    ];
    chained(&numbers, [&answer.row_widths, &answer.partial_sums].map(AsRef::as_ref))
}

fn chained<const FIELDS: usize>(numbers: &[u64], fields: [&[u8]; FIELDS]) -> u64 {
    let mut bytes = [0; 64];
    for (place, number) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
        *place = number.to_le_bytes();
    }
    fields.into_iter().fold(xxh3_64_with_seed(&bytes, 0), |seed, field| {
        xxh3_64_with_seed(field, seed)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> v1::ExecuteRequest {
        v1::ExecuteRequest {
            request_id: 7,
            layer: 1,
            rows: 2,
            hidden: 4,
            format: v1::ActivationFormat::F32.into(),
            hidden_states: vec![1; 32].into(),
            assignment_counts: vec![1, 0, 1, 0].into(),
            expert_ids: vec![3, 0, 5, 0].into(),
            routing_weights: vec![2; 8].into(),
            first_blocks: vec![0; 4].into(),
            end_blocks: vec![1, 0, 1, 0].into(),
            deadline_micros: 5,
            ..Default::default()
        }
    }

    fn answer() -> v1::ExecuteResponse {
        v1::ExecuteResponse {
            request_id: 7,
            status: v1::ExecuteStatus::Ok.into(),
            row_widths: vec![2, 3].into(),
            partial_sums: vec![9; 20].into(),
            ..Default::default()
        }
    }

    #[test]
    fn any_changed_byte_of_a_request_is_found() {
        let mut sealed = request();
        assert!(request_is_intact(&sealed), "older peers send none");
        seal_request(&mut sealed);
        assert!(request_is_intact(&sealed));
        type Field = fn(&mut v1::ExecuteRequest) -> &mut prost::bytes::Bytes;
        let fields: [Field; 6] = [
            |it| &mut it.hidden_states,
            |it| &mut it.assignment_counts,
            |it| &mut it.expert_ids,
            |it| &mut it.routing_weights,
            |it| &mut it.first_blocks,
            |it| &mut it.end_blocks,
        ];
        for field in fields {
            for bit in 0..field(&mut sealed.clone()).len() * 8 {
                let mut flipped = sealed.clone();
                let mut bytes = field(&mut flipped).to_vec();
                bytes[bit / 8] ^= 1 << (bit % 8);
                *field(&mut flipped) = bytes.into();
                assert!(!request_is_intact(&flipped), "bit {bit}");
            }
        }
        type Number = fn(&mut v1::ExecuteRequest);
        let numbers: [Number; 5] = [
            |it| it.request_id += 1,
            |it| it.layer += 1,
            |it| it.rows += 1,
            |it| it.hidden += 1,
            |it| it.format += 1,
        ];
        for change in numbers {
            let mut changed = sealed.clone();
            change(&mut changed);
            assert!(!request_is_intact(&changed));
        }
    }

    #[test]
    fn bytes_that_move_from_one_field_to_the_next_are_found() {
        let mut sealed = answer();
        seal_answer(&mut sealed);
        let mut moved = sealed.clone();
        moved.row_widths = vec![2, 3, 9].into();
        moved.partial_sums = vec![9; 19].into();
        assert!(answer_is_intact(&sealed) && !answer_is_intact(&moved));
    }

    #[test]
    fn an_answer_without_a_checksum_is_not_taken_for_an_intact_one() {
        let mut answer = answer();
        assert!(!answer_is_intact(&answer));
        seal_answer(&mut answer);
        for change in [
            |it: &mut v1::ExecuteResponse| it.status = v1::ExecuteStatus::Overloaded.into(),
            |it: &mut v1::ExecuteResponse| it.request_id += 1,
            |it: &mut v1::ExecuteResponse| it.block = Some(0),
        ] {
            let mut changed = answer.clone();
            change(&mut changed);
            assert!(!answer_is_intact(&changed));
        }
    }
}
