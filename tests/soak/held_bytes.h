// The bytes that this program holds by operator new.
#pragma once

long held_bytes();
