#include "libfsdp/base/error.h"
