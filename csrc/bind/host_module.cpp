// fastdecode._host: enums, and the data structures of drafters that live on the host.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>

#include "core/enums.h"

namespace py = pybind11;

void bind_ngram_index(py::module_& m);  // host_ngram.cpp

PYBIND11_MODULE(_host, m) {
  using namespace fastdecode;
  m.doc() = "Enums and host data structures of fastdecode.";
  py::native_enum<Status>(m, "Status", "enum.IntFlag", "Bits of the status output of every op; 0 = fine.")
      .value("NAN", kStatusNaN)
      .value("NO_MASS", kStatusNoMass)
      .value("UNMAPPED_DRAFT", kStatusUnmappedDraft)
      .value("ZERO_DRAFT_PROB", kStatusZeroDraftProb)
      .value("RESIDUAL_FALLBACK", kStatusResidualFallback)
      .value("BAD_LENGTH", kStatusBadLength)
      .value("BAD_PAGE", kStatusBadPage)
      .value("SATURATED", kStatusSaturated)
      .value("ERRORS", kStatusErrors)
      .finalize();
  py::native_enum<Rule>(m, "Rule", "enum.IntEnum", "Acceptance rules of verify_chain.")
      .value("RATIO", kRuleRatio)
      .value("COUPLED", kRuleCoupled)
      .value("BLOCK", kRuleBlock)
      .value("TYPICAL", kRuleTypical)
      .value("TOP_BETA", kRuleTopBeta)
      .finalize();
  py::native_enum<Bonus>(m, "Bonus", "enum.IntEnum", "Last token of verify_chain's rule typical.")
      .value("GREEDY", kBonusGreedy)
      .value("SAMPLE", kBonusSample)
      .finalize();
  py::native_enum<Order>(m, "Order", "enum.IntEnum", "Order of the filters top-k and top-p.")
      .value("K_THEN_P", kOrderKThenP)
      .value("JOINT", kOrderJoint)
      .finalize();
  py::native_enum<FinishReason>(m, "FinishReason", "enum.IntEnum", "Why commit ended a request.")
      .value("NONE", kFinishNone)
      .value("STOP", kFinishStop)
      .value("LENGTH", kFinishLength)
      .finalize();
  py::native_enum<Stream>(m, "Stream", "enum.IntEnum", "Who draws from the counter-based noise.")
      .value("TOKEN", kStreamToken)
      .value("DRAFT", kStreamDraft)
      .value("ACCEPT", kStreamAccept)
      .value("RESIDUAL", kStreamResidual)
      .value("BONUS", kStreamBonus)
      .value("UNMASK_ORDER", kStreamUnmaskOrder)
      .value("UNMASK_TOKEN", kStreamUnmaskToken)
      .value("USER", kStreamUser)
      .finalize();
  py::native_enum<KVScheme>(m, "KVScheme", "enum.IntEnum", "How keys and values lie in a cache.")
      .value("PLAIN", kKVPlain)
      .value("FP8_E4M3", kKVFp8E4M3)
      .value("FP8_E5M2", kKVFp8E5M2)
      .value("INT8", kKVInt8)
      .value("INT4", kKVInt4)
      .value("KIVI4", kKVKivi4)
      .value("KIVI2", kKVKivi2)
      .finalize();
  py::native_enum<TreeError>(m, "TreeError", "enum.IntEnum", "What tree_check finds wrong with a tree.")
      .value("VALID", kTreeValid)
      .value("BAD_COUNT", kTreeBadCount)
      .value("BAD_ROOT", kTreeBadRoot)
      .value("BAD_PARENT", kTreeBadParent)
      .finalize();
  bind_ngram_index(m);
}
