//! `cosine_similarity(a, b)`: 1 less DataFusion's `cosine_distance`, for lists of numbers.
//!
//! In: two lists of equal length, of any numeric type. Out: float64 in [-1, 1]; null where a list
//! is null, has a null in it, or is all zeros (an angle to nothing).

use std::sync::Arc;

use arrow::array::AsArray;
use arrow::datatypes::{DataType, Float64Type};
use datafusion::common::{Result, ScalarValue};
use datafusion::functions_nested::cosine_distance::CosineDistance;
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature};

/// The function's name in SQL.
pub const COSINE_SIMILARITY: &str = "cosine_similarity";

/// The function, to be registered.
pub fn cosine_similarity() -> ScalarUDF {
    ScalarUDF::new_from_impl(CosineSimilarity { distance: CosineDistance::new() })
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct CosineSimilarity {
    distance: CosineDistance,
}

impl ScalarUDFImpl for CosineSimilarity {
    fn name(&self) -> &str {
        COSINE_SIMILARITY
    }

    fn signature(&self) -> &Signature {
        self.distance.signature()
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        self.distance.return_type(arg_types)
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        self.distance.coerce_types(arg_types)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        match self.distance.invoke_with_args(args)? {
            ColumnarValue::Scalar(ScalarValue::Float64(distance)) => {
                Ok(ColumnarValue::Scalar(ScalarValue::Float64(distance.map(|d| 1.0 - d))))
            }
            distance => {
                let distance = distance.into_array(1)?;
                let similarity = distance.as_primitive::<Float64Type>().unary::<_, Float64Type>(|d| 1.0 - d);
                Ok(ColumnarValue::Array(Arc::new(similarity)))
            }
        }
    }
}
