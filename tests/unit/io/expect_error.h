// EXPECT_ERROR(statement, Type, "part of the text"): the type alone would also accept the wrong
// message.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#define EXPECT_ERROR(statement, Type, part)                    \
  try {                                                        \
    statement;                                                 \
    ADD_FAILURE() << "expected " #Type ", nothing was thrown"; \
  } catch (const Type& error) {                                \
    EXPECT_THAT(error.what(), ::testing::HasSubstr(part));     \
  }
