//! The laws that hold for every method: see `peft_testing` for what they are.
//!
//! Add a case for every setting of the method, with odd sizes.

use peft_scale::ScaleConfig;
use peft_testing::conforms;
use serde_json::json;

#[test]
fn laws() {
    conforms::<ScaleConfig>(&[
        json!({"peft_type": "SCALE", "target_modules": ["q_proj", "o_proj"]}),
        json!({"peft_type": "SCALE", "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    ]);
}
