// variants: sm80
// Attention over int8 keys and values, of 1 to 8 rows at once. See attend.cuh.
#include "attend.cuh"

ATTEND(attend_i8_1, 2, 1)
ATTEND(attend_i8_4, 2, 4)
ATTEND(attend_i8_8, 2, 8)
