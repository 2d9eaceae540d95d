//! Images that are well-formed and lie: one field says something else than what is so.
//!
//! A state is taken apart by its own description (serde), whatever its fields are, and put together
//! again. A field gets the value of another one of the same name, or one of the numbers that are special;
//! lists lose, double and multiply their elements.

use crate::mutate::{Random, body_of, frames, put_body};
use checkpoint::image::objects::ObjectImage;
use checkpoint::image::{ProcessImage, codec};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Kinds of frames (image/stream.rs).
const STATE: u8 = 0;
const OBJECT: u8 = 6;

/// Makes a stream lie in one of its states, or of one of its objects. `false`: there is none to do it.
pub fn lie(random: &mut Random, stream: &mut Vec<u8>) -> bool {
    let all = frames(stream);
    let of_kind =
        |kind: u8| -> Vec<_> { all.iter().copied().filter(|&(at, _)| stream[at + 5] == kind).collect() };
    let (states, objects) = (of_kind(STATE), of_kind(OBJECT));
    let of_object = !objects.is_empty() && random.below(8) == 0;
    let frame = match (of_object, states.is_empty()) {
        (true, _) => objects[random.below(objects.len())],
        // The first one has what belongs to all of them.
        (false, false) if random.below(2) == 0 => states[0],
        (false, false) => states[random.below(states.len())],
        (false, true) => return false,
    };
    let body = body_of(stream, frame);
    let told = match of_object {
        true => retold::<ObjectImage>(random, body),
        false => retold::<ProcessImage>(random, body),
    };
    let Some(told) = told else { return false };
    put_body(stream, frame, &told);
    true
}

fn retold<T: Serialize + DeserializeOwned>(random: &mut Random, body: &[u8]) -> Option<Vec<u8>> {
    let truth: T = codec::decode(body).ok()?;
    let truth = serde_json::to_value(&truth).ok()?;
    // Most of what does not fit its type is not tried again.
    for _ in 0..50 {
        let mut told = truth.clone();
        for _ in 0..=random.below(3) {
            change(random, &truth, &mut told);
        }
        if told == truth {
            continue;
        }
        if let Some(body) = serde_json::from_value::<T>(told).ok().and_then(|told| codec::encode(&told).ok())
        {
            return Some(body);
        }
    }
    None
}

fn change(random: &mut Random, truth: &Value, told: &mut Value) {
    let mut node = told;
    let mut name = String::new();
    loop {
        // Few fields are long, and long ones have few meanings.
        let stay = match &*node {
            Value::Object(_) => random.below(10) == 0,
            Value::Array(list) => list.is_empty() || random.below(if list.len() > 64 { 2 } else { 5 }) == 0,
            _ => true,
        };
        if stay {
            break;
        }
        node = match node {
            Value::Object(fields) => {
                let keys: Vec<String> = fields.keys().cloned().collect();
                // Files, and what is beneath, are most of what there is.
                let files = keys.iter().find(|key| *key == "files").filter(|_| random.below(2) == 0);
                name = files.unwrap_or(&keys[random.below(keys.len())]).clone();
                fields.get_mut(&name).expect("it has that")
            }
            Value::Array(list) => {
                let place = random.below(list.len());
                &mut list[place]
            }
            _ => unreachable!("neither has anything in it"),
        };
    }
    if random.below(3) == 0 {
        let mut same = Vec::new();
        named(truth, &name, &mut same);
        if !same.is_empty() {
            *node = same[random.below(same.len())].clone();
            return;
        }
    }
    match node {
        Value::Number(number) => *node = another(random, number.as_i64().unwrap_or(-1)),
        Value::Bool(flag) => *flag = !*flag,
        Value::Null => *node = another(random, 0),
        Value::String(text) => *text = "x".repeat(random.below(10_000)),
        Value::Array(list) => shuffle(random, list),
        Value::Object(_) => {}
    }
}

fn another(random: &mut Random, number: i64) -> Value {
    match random.below(12) {
        0 => 0.into(),
        1 => 1.into(),
        2 => number.wrapping_add(1).into(),
        3 => number.wrapping_sub(1).into(),
        4 => u32::MAX.into(),
        5 => i32::MAX.into(),
        6 => u64::MAX.into(),
        7 => i64::MAX.into(),
        8 => (-1).into(),
        9 => i64::from(i32::MIN).into(),
        10 => (number ^ (1 << random.below(40))).into(),
        _ => (random.next() >> random.below(64)).into(),
    }
}

fn shuffle(random: &mut Random, list: &mut Vec<Value>) {
    if list.is_empty() {
        return list.push(another(random, 0));
    }
    let (from, to) = (random.below(list.len()), random.below(list.len()));
    match random.below(6) {
        0 => drop(list.remove(from)),
        1 => list.push(list[from].clone()),
        2 => list.swap(from, to),
        3 => list[to] = list[from].clone(),
        4 => list.clear(),
        _ => {
            // So many that the states stay readable in reasonable time, and this program small.
            let more = random.below(200_000 / weight(&list[from]));
            let element = list[from].clone();
            list.extend(std::iter::repeat_n(element, more));
        }
    }
}

/// How many values it consists of, beginning with itself; far fewer than 200,000 of a state that tells the truth.
fn weight(value: &Value) -> usize {
    match value {
        Value::Object(fields) => 1 + fields.values().map(weight).sum::<usize>(),
        Value::Array(list) => 1 + list.iter().map(weight).sum::<usize>(),
        _ => 1,
    }
}

/// The values of all fields of this name.
fn named<'a>(within: &'a Value, name: &str, found: &mut Vec<&'a Value>) {
    match within {
        Value::Object(fields) => {
            for (key, value) in fields {
                if key == name {
                    found.push(value);
                }
                named(value, name, found);
            }
        }
        // Bytes are no fields.
        Value::Array(list) if !list.first().is_some_and(Value::is_number) => {
            list.iter().for_each(|value| named(value, name, found));
        }
        _ => {}
    }
}
